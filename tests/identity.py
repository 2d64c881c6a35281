"""A model's identity, as a worker makes it."""

from __future__ import annotations

from pathlib import Path

from models_db.content import content_files
from models_db.identity import fingerprint_of
from worker.content import NoDigestCache, hash_content


def fingerprint(folder: Path, *, allow_pickle: bool = False) -> str:
    content = hash_content(lambda: content_files(folder, allow_pickle=allow_pickle), NoDigestCache())
    return fingerprint_of(content.root_sha256)

"""A model's identity, as a worker makes it."""

from __future__ import annotations

from pathlib import Path

from qbatch.core.identity import fingerprint_of
from qbatch.core.model_files import content_files
from qbatch.worker.files.content import NoDigestCache, hash_content


def fingerprint(folder: Path, *, allow_pickle: bool = False) -> str:
    content = hash_content(lambda: content_files(folder, allow_pickle=allow_pickle), NoDigestCache())
    return fingerprint_of(content.root_sha256)

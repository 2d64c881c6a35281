"""A checkpoint of weights that changed under its job is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qbatch.core.storage import MANIFEST
from tests.chaos.tiny_sources import Sources, fingerprint_of_folder


@pytest.mark.parametrize("number", [0, 2, 3])
def test_other_weights_than_the_manifest_names_are_named(tmp_path: Path, number: int) -> None:
    sources = Sources(tmp_path)
    folder = sources.model(number)
    fingerprint = fingerprint_of_folder(folder)
    sound = _checkpoint(folder, tmp_path / "sound", fingerprint)
    assert not sources.is_of_former_weights(sound)
    sources.rewrite(folder)
    assert sources.is_of_former_weights(sound)
    mixed = _checkpoint(folder, tmp_path / "mixed", fingerprint)
    assert list(sources.differences(sound)) == []
    assert list(sources.differences(_checkpoint(folder, tmp_path / "later", fingerprint_of_folder(folder)))) == []
    assert any("embeddings" in line or "embed_tokens" in line for line in sources.differences(mixed))
    unknown = _checkpoint(folder, tmp_path / "unknown", "folder:another")
    assert list(sources.differences(unknown)) == ["is of weights that never were"]
    assert sources.changed == {folder}


def _checkpoint(source: Path, folder: Path, fingerprint: str) -> Path:
    shutil.copytree(source, folder)
    (folder / MANIFEST).write_text(json.dumps({"source": {"fingerprint": fingerprint}}))
    return folder

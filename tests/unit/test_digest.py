from __future__ import annotations

import hashlib
from pathlib import Path

from qbatch.core import digest
from qbatch.core.digest import CHUNK_BYTES, FileDigest, digest_file, root_sha256


def test_each_chunk_is_hashed_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(CHUNK_BYTES * 2 + 3)
        file.seek(CHUNK_BYTES - 1)
        file.write(b"ab")

    found = digest_file(path)

    raw = path.read_bytes()
    pieces = [raw[start : start + CHUNK_BYTES] for start in range(0, len(raw), CHUNK_BYTES)]
    assert found.name == "weights"
    assert found.size == CHUNK_BYTES * 2 + 3
    assert found.chunk_sha256 == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert digest_file(tmp_path / "empty") == FileDigest(name="empty", size=0, chunk_sha256=())


def test_the_root_does_not_depend_on_order_but_on_everything_else() -> None:
    one = FileDigest(name="a", size=1, chunk_sha256=("00",))
    two = FileDigest(name="b", size=2, chunk_sha256=("11", "22"))
    assert root_sha256([one, two]) == root_sha256(iter([two, one]))
    changed = [
        FileDigest(name="c", size=1, chunk_sha256=("00",)),
        FileDigest(name="a", size=2, chunk_sha256=("00",)),
        FileDigest(name="a", size=1, chunk_sha256=("01",)),
        FileDigest(name="a", size=1, chunk_sha256=("00", "11")),
    ]
    assert len({root_sha256([other, two]) for other in [one, *changed]}) == 5


def test_digest_imports_no_torch() -> None:
    source = Path(digest.__file__).read_text()
    assert "import torch" not in source

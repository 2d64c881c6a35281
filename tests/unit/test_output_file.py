"""A weight file that is written in pieces: what is complete is hashed, and on its way to the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbatch.core.digest import CHUNK_BYTES, digest_file
from qbatch.worker.files import writeback
from qbatch.worker.files.writeback import start_writeback
from qbatch.worker.quantizing.planning.layout import FileLayout
from qbatch.worker.quantizing.streaming import output_file
from qbatch.worker.quantizing.streaming.output_file import OutputFile

HEAD = bytes(8)
LAYOUT = FileLayout(name="weights", head=HEAD, outputs=(), starts={}, size=len(HEAD) + 2 * CHUNK_BYTES)


def test_what_is_complete_is_hashed_and_sent_to_the_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def start(descriptor: int, start: int, nbytes: int) -> None:
        sent.append((start, nbytes))
        start_writeback(descriptor, start, nbytes)

    monkeypatch.setattr(output_file, "start_writeback", start)
    rest = os.urandom(2 * CHUNK_BYTES)
    file = OutputFile(tmp_path, LAYOUT, writers=1)
    file.write(rest[CHUNK_BYTES:], len(HEAD) + CHUNK_BYTES)
    assert sent == [(2 * CHUNK_BYTES, CHUNK_BYTES)], "of the second, the beginning is missing"
    file.write(rest[:CHUNK_BYTES], len(HEAD))
    assert sent[1:] == [(0, CHUNK_BYTES), (CHUNK_BYTES, CHUNK_BYTES)]
    found = file.digest()
    file.close()
    assert (tmp_path / "weights").read_bytes() == HEAD + rest
    assert found == digest_file(tmp_path / "weights")


@pytest.mark.parametrize("is_known", [True, False], ids=["Linux", "another system"])
def test_a_file_that_cannot_be_sent_ahead_is_none_the_worse(monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    if not is_known:
        monkeypatch.setattr(writeback, "_sync_file_range", None)
    read_end, write_end = os.pipe()
    try:
        start_writeback(write_end, 0, 1)
        os.write(write_end, b"x")
        assert os.read(read_end, 1) == b"x"
    finally:
        os.close(read_end)
        os.close(write_end)

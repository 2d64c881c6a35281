"""A weight file that threads write in any order, and whose chunks are hashed, and on their way to the disk, as soon as
they are complete."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from qbatch.core.digest import CHUNK_BYTES, FileDigest
from qbatch.worker.files.writeback import start_writeback
from qbatch.worker.quantizing.planning.layout import FileLayout
from qbatch.worker.quantizing.streaming.preallocate import preallocate

_HASH_READ_BYTES = 2**22


class OutputFile:
    """One safetensors file being written. Any thread may call ``write``; every byte must be written exactly once. At
    most ``writers`` threads write to the file at a time (see ``writers_per_file``).

    The thread that completes a chunk reads it back from the page cache and hashes it. Keeping chunks in memory until
    they are full would cost 64 MiB for each of the three or four places at which a file grows.
    """

    def __init__(self, folder: Path, layout: FileLayout, writers: int) -> None:
        self.layout = layout
        self._lock = threading.Lock()
        self._writing = threading.Semaphore(writers)
        sizes = [min(CHUNK_BYTES, layout.size - start) for start in range(0, layout.size, CHUNK_BYTES)]
        self._unwritten = sizes
        self._hashes: list[str | None] = [None] * len(sizes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(folder / layout.name, flags, 0o666)
        try:
            preallocate(self._descriptor, layout.size)
            self.write(layout.head, 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes | memoryview, start: int) -> None:
        """Write ``data`` at byte ``start``, and hash the chunks that this completes. Raises OSError."""
        left, position = memoryview(data), start
        with self._writing:
            while left:
                written = os.pwrite(self._descriptor, left, position)
                left, position = left[written:], position + written
        for chunk in self._completed(start, position):
            self._hashes[chunk] = self._sha256(chunk)
            start_writeback(self._descriptor, chunk * CHUNK_BYTES, CHUNK_BYTES)

    def _completed(self, start: int, end: int) -> list[int]:
        completed = []
        with self._lock:
            for chunk in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
                first = chunk * CHUNK_BYTES
                self._unwritten[chunk] -= min(end, first + CHUNK_BYTES) - max(start, first)
                if self._unwritten[chunk] == 0:
                    completed.append(chunk)
        return completed

    def _sha256(self, chunk: int) -> str:
        digest, buffer = hashlib.sha256(), bytearray(_HASH_READ_BYTES)
        position, end = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, self.layout.size)
        while position < end:
            view = memoryview(buffer)[: end - position]
            read = os.preadv(self._descriptor, [view], position)
            if not read:
                raise OSError(f"{self.layout.name} ends at byte {position} of {self.layout.size}")
            digest.update(view[:read])
            position += read
        return digest.hexdigest()

    def digest(self) -> FileDigest:
        """The finished file's checksums. Raises ValueError if some bytes were never written."""
        hashes = tuple(value for value in self._hashes if value is not None)
        if len(hashes) != len(self._hashes):
            raise ValueError(f"{self.layout.name}: {sum(self._unwritten)} bytes were never written")
        return FileDigest(name=self.layout.name, size=self.layout.size, chunk_sha256=hashes)

    def close(self) -> None:
        os.close(self._descriptor)

"""Checksums of large files: the sha256 of each 64 MiB chunk, and one root hash over all files of a model.

Chunks can be hashed in parallel and in any order; a single hash over a whole file cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.byte_units import MIB

CHUNK_BYTES = 64 * MIB
_READ_BYTES = MIB
_MOST_THREADS = 16

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file's name (no folder), its size in bytes, and the sha256 (hex) of each chunk of CHUNK_BYTES, in order."""

    name: str
    size: int
    chunk_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """The sha256 (hex) of each chunk of CHUNK_BYTES of a file, in order; and of the whole file, or None.

    The hash of the whole file is computed on request, and is always known for a file of at most one chunk.
    """

    chunk_sha256: tuple[str, ...]
    sha256: str | None


def digest_file(path: Path) -> FileDigest:
    """Hash a file on disk. An empty file has no chunks. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        (hashed,) = checksums([(descriptor, size)])
    finally:
        os.close(descriptor)
    return FileDigest(name=path.name, size=size, chunk_sha256=hashed.chunk_sha256)


def checksums(
    files: Sequence[tuple[int, int]], *, whole: Collection[int] = (), on_bytes: OnBytes = lambda _: None
) -> list[Checksums]:
    """Hash open files, given as (descriptor, size in bytes), on as many threads as there are processors.

    ``whole`` holds the descriptors of the files whose sha256 over all bytes is needed as well; it is computed from the
    same reads, one chunk after another. ``on_bytes`` is called with the number of bytes just hashed, from any thread.
    Returns one result per file, in the order of ``files``. Raises OSError.
    """
    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, _processors())) as pool:
        # The largest whole-file hashes start first, because one of them cannot be divided among threads.
        order = sorted(range(len(files)), key=lambda n: (files[n][0] not in whole, -files[n][1]))
        started = {n: _start(pool, *files[n], is_whole=files[n][0] in whole, on_bytes=on_bytes) for n in order}
        return [started[n]() for n in range(len(files))]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(
    pool: ThreadPoolExecutor, descriptor: int, size: int, *, is_whole: bool, on_bytes: OnBytes
) -> Callable[[], Checksums]:
    if is_whole and size > CHUNK_BYTES:
        return pool.submit(_stream, descriptor, size, on_bytes).result
    chunks: list[Future[str]] = [
        pool.submit(_chunk_sha256, descriptor, start, on_bytes) for start in range(0, size, CHUNK_BYTES)
    ]

    def gather() -> Checksums:
        hashes = tuple(chunk.result() for chunk in chunks)
        if len(hashes) > 1:
            return Checksums(chunk_sha256=hashes, sha256=None)
        return Checksums(chunk_sha256=hashes, sha256=hashes[0] if hashes else hashlib.sha256().hexdigest())

    return gather


def _stream(descriptor: int, size: int, on_bytes: OnBytes) -> Checksums:
    whole = hashlib.sha256()
    chunks = tuple(_chunk_sha256(descriptor, start, on_bytes, whole.update) for start in range(0, size, CHUNK_BYTES))
    return Checksums(chunk_sha256=chunks, sha256=whole.hexdigest())


def _chunk_sha256(
    descriptor: int, start: int, on_bytes: OnBytes, also: Callable[[bytes], object] = lambda _: None
) -> str:
    digest = hashlib.sha256()
    position, end = start, start + CHUNK_BYTES
    while position < end and (data := os.pread(descriptor, min(_READ_BYTES, end - position), position)):
        digest.update(data)
        also(data)
        position += len(data)
    on_bytes(position - start)
    return digest.hexdigest()


def root_sha256(digests: Iterable[FileDigest]) -> str:
    """One sha256 (hex) over names, sizes and chunk hashes; the order of ``digests`` does not matter."""
    entries = sorted([digest.name, digest.size, list(digest.chunk_sha256)] for digest in digests)
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

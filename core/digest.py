"""Checksums of large files: sha256 of each 64 MiB chunk, and one root over all files of a checkpoint or a source.

Chunks can be hashed in parallel and in any order, which one stream over the whole file cannot.
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
    """A file's name (no folder), size in bytes, and the sha256 (hex) of each CHUNK_BYTES of it, in order."""

    name: str
    size: int
    chunk_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksums:
    """The sha256 (hex) of each CHUNK_BYTES of a file, in order, and of the whole, where that was asked for."""

    chunk_sha256: tuple[str, ...]
    sha256: str | None


def digest_file(path: Path) -> FileDigest:
    """Hash one file as it is on disk. An empty file has no chunks. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        (found,) = checksums([(descriptor, size)])
    finally:
        os.close(descriptor)
    return FileDigest(name=path.name, size=size, chunk_sha256=found.chunk_sha256)


def checksums(
    files: Sequence[tuple[int, int]], *, whole: Collection[int] = (), on_bytes: OnBytes = lambda _: None
) -> list[Checksums]:
    """Hash open files, given as (descriptor, size in bytes), on as many threads as there are processors.

    ``whole`` are the descriptors of those whose one sha256 is wanted too: it is made of the same reads, in one stream.
    ``on_bytes`` is told how much was hashed, from any thread. Raises OSError.
    """
    with ThreadPoolExecutor(max_workers=min(_MOST_THREADS, _processors())) as pool:
        # The longest streams first: they alone cannot be shared.
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
        found = tuple(chunk.result() for chunk in chunks)
        if len(found) > 1:
            return Checksums(chunk_sha256=found, sha256=None)
        return Checksums(chunk_sha256=found, sha256=found[0] if found else hashlib.sha256().hexdigest())

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

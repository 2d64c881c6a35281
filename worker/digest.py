"""Checksums of large files: sha256 of each 64 MiB chunk, and one root over all files of a checkpoint.

Chunks can be hashed in parallel and in any order, which one stream over the whole file cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CHUNK_BYTES = 64 * 2**20
_READ_BYTES = 2**20
_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file's name (no folder), size in bytes, and the sha256 (hex) of each CHUNK_BYTES of it, in order."""

    name: str
    size: int
    chunk_sha256: tuple[str, ...]


def digest_file(path: Path) -> FileDigest:
    """Hash one file as it is on disk. An empty file has no chunks. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        starts = range(0, size, CHUNK_BYTES)
        with ThreadPoolExecutor(max_workers=max(1, min(_THREADS, len(starts)))) as pool:
            chunks = tuple(pool.map(partial(_chunk_sha256, descriptor), starts))
    finally:
        os.close(descriptor)
    return FileDigest(name=path.name, size=size, chunk_sha256=chunks)


def _chunk_sha256(descriptor: int, start: int) -> str:
    digest = hashlib.sha256()
    position, end = start, start + CHUNK_BYTES
    while position < end and (data := os.pread(descriptor, min(_READ_BYTES, end - position), position)):
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


def root_sha256(digests: Iterable[FileDigest]) -> str:
    """One sha256 (hex) over names, sizes and chunk hashes; the order of ``digests`` does not matter."""
    entries = sorted([digest.name, digest.size, list(digest.chunk_sha256)] for digest in digests)
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

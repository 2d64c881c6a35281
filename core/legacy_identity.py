"""The fingerprints that version 0.1.0 gave to sources, which find the results that it stored.

That of a folder covers file names, sizes, times and headers; that of a hub model is its commit. Results of a hub model
still answer jobs if its files match the hub's. Results of a folder are only counted, because the fingerprint covers
neither the folder's path nor its content.
"""

from __future__ import annotations

from pathlib import Path

from qbatch.core.domain import content_hash
from qbatch.core.sources import SIDECARS, read_config, read_headers


def legacy_folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a folder. Raises SourceNotFound, SourceCorrupt, UnsafeSource, StorageError or OSError."""
    files = [
        {
            "name": header.path.name,
            "size": header.size,
            "mtime_ns": header.path.stat().st_mtime_ns,
            "tensors": [[t.name, t.dtype, list(t.shape), t.start] for t in header.tensors],
        }
        for header in read_headers(folder)
    ]
    return "folder:" + content_hash({"config": dict(read_config(folder)), "files": files, "beside": _beside(folder)})


def _beside(folder: Path) -> list[tuple[str, int, int]]:
    paths = {path for pattern in SIDECARS for path in folder.glob(pattern) if path.is_file()}
    paths -= {folder / "config.json", *folder.glob("*.index.json")}
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(paths)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def legacy_hub_fingerprint(commit_sha: str, code_sha256: str | None) -> str:
    """The fingerprint of a hub model. ``code_sha256`` is the hash of its Python files if its own code runs."""
    return f"hub:{commit_sha}" if code_sha256 is None else f"hub:{commit_sha}+{code_sha256}"

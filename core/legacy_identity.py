"""How 0.1.0 told sources apart: a folder by names, sizes, times and headers, a hub's model by its commit.

Results that were stored so are found by it: those of a hub's model whose files are the hub's answer jobs, those of a
folder are counted, since neither its place nor its content stood in them.
"""

from __future__ import annotations

from pathlib import Path

from qbatch.core.domain import content_hash
from qbatch.core.sources import SIDECARS, read_config, read_headers


def legacy_folder_fingerprint(folder: Path) -> str:
    """Raises SourceNotFound, SourceCorrupt, UnsafeSource, StorageError or OSError."""
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
    found = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(paths)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def legacy_hub_fingerprint(commit_sha: str, code_sha256: str | None) -> str:
    """``code_sha256`` is that of the Python files of a model whose own code runs."""
    return f"hub:{commit_sha}" if code_sha256 is None else f"hub:{commit_sha}+{code_sha256}"

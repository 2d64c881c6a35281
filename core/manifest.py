"""Reads a checkpoint's manifest: the published files with their checksums, and the audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from qbatch.core.digest import CHUNK_BYTES, FileDigest, root_sha256

MANIFEST = "qbatch.json"

# How many digits of a checksum a message shows.
_SHOWN_DIGITS = 16
_FIELDS = {"key": str, "root_sha256": str, "files": list, "audit": dict, "quantize_s": float | int | None}
_FILE_FIELDS = {"name": str, "size": int, "chunk_sha256": list}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a manifest that qbatch reads back.

    ``database`` is the id of the database whose job wrote the checkpoint; None if an older version wrote it.
    ``base_key``: of an adapter, the key of the checkpoint that it belongs to.
    """

    key: str
    root_sha256: str
    files: tuple[FileDigest, ...]
    audit: Mapping[str, Any]
    quantize_s: float | None
    database: str | None = None
    base_key: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the manifest in ``folder``. None if there is none, or it is invalid. Raises OSError."""
        try:
            value = json.loads((folder / MANIFEST).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cls.from_json(value) if _is_manifest(value) else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        files = tuple(
            FileDigest(name=entry["name"], size=entry["size"], chunk_sha256=tuple(entry["chunk_sha256"]))
            for entry in value["files"]
        )
        database, base = value.get("database"), value.get("base")
        base_key = base.get("key") if isinstance(base, dict) else None
        return cls(
            **{name: value[name] for name in _FIELDS} | {"files": files},
            database=database if isinstance(database, str) else None,
            base_key=base_key if isinstance(base_key, str) else None,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files)

    @property
    def weights_bytes(self) -> int:
        return sum(file.size for file in self.files if file.name.endswith(".safetensors"))

    def differences(self, existing: Mapping[str, FileDigest | None]) -> list[str]:
        """The differences between the files that exist and those published, one line each; empty if there are none.

        ``existing`` has the digest of every existing file by name; None for a file that was not read.
        """
        lines = [f"{name} is not in the manifest" for name in existing if name not in self.names]
        for published in self.files:
            digest = existing.get(published.name)
            if digest is None:
                lines.append(f"{published.name} is missing")
            elif digest != published:
                lines.append(f"{published.name} has changed since it was published ({_change(published, digest)})")
        if not lines and root_sha256(digest for digest in existing.values() if digest is not None) != self.root_sha256:
            lines.append("the root checksum does not match the files")
        return lines


def _change(published: FileDigest, now: FileDigest) -> str:
    """How a file differs from what was published: by its size, else by which parts of its content do."""
    if now.size != published.size:
        return f"now {now.size} bytes, then {published.size}"
    pairs = list(zip(now.chunk_sha256, published.chunk_sha256, strict=False))
    changed = [index for index, (one, other) in enumerate(pairs) if one != other]
    if not changed:
        return f"still {now.size} bytes, but the manifest has another number of checksums for it"
    first, last = changed[0] * CHUNK_BYTES, min((changed[0] + 1) * CHUNK_BYTES, now.size) - 1
    parts = f"{len(changed)} of {len(pairs)} parts" if len(pairs) > 1 else "the content"
    digest, before = (digest[:_SHOWN_DIGITS] for digest in pairs[changed[0]])
    return (
        f"still {now.size} bytes, but {parts} {'differ' if len(changed) > 1 else 'differs'}: bytes {first} to {last} "
        f"have the SHA-256 {digest}…, and {before}… was published"
    )


def _is_manifest(value: Any) -> bool:
    return (
        _has_fields(value, _FIELDS)
        and all(_has_fields(entry, _FILE_FIELDS) for entry in value["files"])
        and all(_is_file_name(entry["name"]) for entry in value["files"])
    )


def _has_fields(value: Any, fields: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(
        name in value and isinstance(value[name], kind) for name, kind in fields.items()
    )


def _is_file_name(name: str) -> bool:
    """Whether ``name`` is a relative path inside the folder. A manifest must not refer to files outside of it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name

"""Checkpoints on shared storage: staged, described by a manifest, published by one rename, verified."""

from __future__ import annotations

import json
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbatch.core.digest import CHUNK_BYTES, FileDigest, digest_file, root_sha256
from qbatch.core.domain import DType, Scheme
from qbatch.core.errors import SourceChanged, StorageError
from qbatch.core.filesystem import OCCUPIED_ERRNOS, Refusal, add_default_permissions, move, sync
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.storage import MODEL_CARD, unpublished_files
from qbatch.worker.checkpoints.sidecars import copy_sidecars
from qbatch.worker.files.content import Content, NoDigestCache, hash_content
from qbatch.worker.files.staging import storage_error

_MANIFEST_VERSION = 1
# Each attempt but the last found that others had moved a damaged checkpoint aside and published a new one.
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published checkpoint.

    ``path`` is relative to the storage; ``disk_bytes`` is the size of the weights. ``versions`` are the states in which
    its files were verified (see ``Content.versions``).
    """

    key: str
    path: str
    root_sha256: str
    disk_bytes: int
    audit: Mapping[str, Any]
    quantize_s: float | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A published checkpoint and the content of its files, all of which matched the manifest."""

    published: Published
    content: Content

    def confirm(self) -> Published:
        """Check the files again after use, and return the checkpoint to record. Raises SourceChanged, StorageError."""
        self.content.confirm()
        return replace(self.published, versions=self.content.versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The origin of a checkpoint, as recorded in its manifest."""

    model: str
    revision: str | None
    fingerprint: str
    scheme: Scheme
    dtype: DType
    device_kind: str
    device_name: str
    versions: Mapping[str, str]


def slug(name: str) -> str:
    """A model's name as one path component: letters, digits, dots, dashes; never empty, never hidden."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip(".-_")
    return words[:80] or "model"


def checkpoint_path(model: str, scheme: Scheme, key: str) -> str:
    """The path of a checkpoint relative to the storage. It consists of a slug and hashes, and needs no escaping."""
    return f"checkpoints/{slug(model)}/{scheme.method}-{key[:16]}"


def publish(
    folder: Path,
    *,
    storage: Path,
    source: Path,
    key: str,
    origin: Origin,
    files: Sequence[FileDigest],
    audit: Mapping[str, Any],
    quantize_s: float,
    confirm: Callable[[], None],
) -> Verified:
    """Complete the staged ``folder`` and rename it into place.

    ``files`` are those that the writer has hashed already. ``confirm`` is called after the last use of the source; if
    it raises, nothing is published. If two writers publish the same checkpoint, the first rename wins, and the other
    one uses that checkpoint if it verifies. Raises DiskFull, StorageError, or Unsupported if the files next to the
    weights are too large.
    """
    path = checkpoint_path(origin.model, origin.scheme, key)
    try:
        copy_sidecars(source, folder)
        confirm()
        digests = _complete(folder, files)
        refused = _set_modes(folder) | sync(*folder.rglob("*"), folder)
        _write_manifest(
            folder, key=key, origin=origin, digests=digests, audit=audit, quantize_s=quantize_s, refused=refused
        )
        sync(folder / MANIFEST, folder)
        _move_into_place(folder, storage / path)
    except OSError as error:
        raise storage_error(error, "cannot publish") from error
    verified = find_published(storage, path, key)
    if verified is None:
        raise StorageError(f"{path} does not verify right after it was published")
    return verified


def find_published(storage: Path, path: str, key: str) -> Verified | None:
    """The checkpoint at ``path`` if it exists, has this key, and every file matches the manifest; else None.

    A checkpoint that does not match is moved aside. Raises StorageError if it cannot be read.
    """
    folder = storage / path
    for _ in range(_ATTEMPTS):
        try:
            judged = _identity(folder)
            if judged is None:
                return None
            manifest = Manifest.read(folder)
            is_its_own = manifest is not None and manifest.key == key
            if manifest is not None and not is_its_own and not path.endswith(key[:16]):
                return None  # the checkpoint is where it belongs, and was looked up with the key of another one
            content = _verified(folder, manifest) if manifest is not None and is_its_own else None
            is_still_there = _identity(folder) == judged
        except OSError as error:
            raise storage_error(error, "cannot verify a checkpoint") from error
        except StorageError as error:
            raise StorageError(f"cannot verify a checkpoint: {error}") from error
        if manifest is not None and content is not None:
            return Verified(published=_as_published(path, manifest, content), content=content)
        # Others may have moved it aside and published a new one meanwhile; then verify that one.
        if is_still_there:
            _reject(folder, judged)
            return None
    raise StorageError(
        f"{path} changed its inode during each of {_ATTEMPTS} attempts to verify it: does its file system keep inodes?"
    )


_Identity = tuple[int, int]


def _identity(folder: Path) -> _Identity | None:
    """The device and inode of a folder; None if it does not exist. Raises OSError."""
    try:
        result = folder.stat()
    except FileNotFoundError:
        return None
    return (result.st_dev, result.st_ino) if stat.S_ISDIR(result.st_mode) else None


def _verified(folder: Path, manifest: Manifest) -> Content | None:
    """The content of the files that the manifest names, read anew; None where it is not what was published."""
    try:
        # Extra files are included, so that they are noticed now and when the content is confirmed after use.
        content = hash_content(
            lambda: {name: folder / name for name in (*manifest.names, *unpublished_files(folder, manifest.names))},
            NoDigestCache(),
        )
    except (SourceChanged, FileNotFoundError):  # a file was removed, or is being written
        return None
    return None if manifest.differences({file.name: file.digest for file in content.files}) else content


def _as_published(path: str, manifest: Manifest, content: Content) -> Published:
    return Published(
        key=manifest.key,
        path=path,
        root_sha256=manifest.root_sha256,
        disk_bytes=manifest.weights_bytes,
        audit=manifest.audit,
        quantize_s=manifest.quantize_s,
        versions=content.versions,
    )


def problems(folder: Path) -> list[str]:
    """How a published checkpoint differs from its manifest, one line each; empty if it does not.

    The model card is not in the manifest, because users may edit it.
    """
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return [f"there is no valid {MANIFEST}"]
        found: dict[str, FileDigest | None] = dict.fromkeys(unpublished_files(folder, manifest.names))
        read = ((name, _digest(folder, name)) for name in manifest.names)
        return manifest.differences(found | {name: digest for name, digest in read if digest is not None})
    except OSError as error:
        return [f"{error.filename or folder.name} cannot be read: {error.strerror}"]


def _digest(folder: Path, name: str) -> FileDigest | None:
    """The digest of a file; None if it does not exist. Raises OSError if it cannot be read, as it may be intact."""
    try:
        digest = digest_file(folder / name)
    except FileNotFoundError:
        return None
    return FileDigest(name=name, size=digest.size, chunk_sha256=digest.chunk_sha256)


def _reject(folder: Path, judged: _Identity) -> None:
    """Move a damaged checkpoint aside, so that it is neither used nor lost."""
    aside = folder.with_name(f"{folder.name}.rejected-{time.time_ns()}")
    try:
        folder.rename(aside)
        if _identity(aside) != judged:  # a new checkpoint had replaced it at the last moment
            aside.rename(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "cannot move a damaged checkpoint aside") from error


def _complete(folder: Path, files: Sequence[FileDigest]) -> list[FileDigest]:
    known = {digest.name: digest for digest in files}
    names = sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MODEL_CARD})
    digests = []
    for name in names:
        digest = known.get(name) or _digest(folder, name)
        if digest is None:
            raise StorageError(f"{name} vanished while it was being published")
        digests.append(digest)
    return digests


def _write_manifest(
    folder: Path,
    *,
    key: str,
    origin: Origin,
    digests: Sequence[FileDigest],
    audit: Mapping[str, Any],
    quantize_s: float,
    refused: Iterable[Refusal],
) -> None:
    manifest = {
        "qbatch_manifest": _MANIFEST_VERSION,
        "key": key,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"model": origin.model, "revision": origin.revision, "fingerprint": origin.fingerprint},
        "scheme": origin.scheme.to_json(),
        "dtype": origin.dtype,
        "device": {"kind": origin.device_kind, "name": origin.device_name},
        "versions": dict(origin.versions),
        "quantize_s": quantize_s,
        "audit": dict(audit),
        "file_system_refused": sorted(refused),
        "chunk_bytes": CHUNK_BYTES,
        "root_sha256": root_sha256(digests),
        "files": [asdict(digest) | {"chunk_sha256": list(digest.chunk_sha256)} for digest in digests],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _set_modes(folder: Path) -> frozenset[Refusal]:
    """Make files readable as usual. Folders have the right mode already, from umask, ACLs and the set-group-ID bit."""
    shared = [add_default_permissions(path) for path in folder.rglob("*") if path.is_file()]
    return frozenset(refusal for refusal in shared if refusal is not None)


def _move_into_place(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        move(folder, target)
    except OSError as error:
        if error.errno not in OCCUPIED_ERRNOS:
            raise
        # Another writer has published it first. The caller verifies that checkpoint.
        shutil.rmtree(folder)
    sync(target.parent)

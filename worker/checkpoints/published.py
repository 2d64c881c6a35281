"""Checkpoints that are published: where they are, and whether they are what their manifest says."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbatch.core.digest import Checksums, FileDigest, digest_file
from qbatch.core.domain import Scheme
from qbatch.core.errors import SourceChanged, StorageError
from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.recovery import Recovery, with_adapter_mark
from qbatch.core.storage import NAMELESS, broken_link, unpublished_files
from qbatch.worker.checkpoints.ownership import mark_adopted
from qbatch.worker.files.content import Content, HashedFile, NoDigestCache, hash_content
from qbatch.worker.files.staging import storage_error

# Each attempt but the last found that others had moved a damaged checkpoint aside and published a new one.
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published checkpoint.

    ``path`` is relative to the storage; ``disk_bytes`` is the size of the weights. ``versions`` are the states in which
    its files were read and verified (see ``Content.versions``).
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
    """A published checkpoint and the content of its files: as its manifest says, read or just written."""

    published: Published
    content: Content

    def confirm(self) -> Published:
        """Check the files again after use, and return the checkpoint to record. Raises SourceChanged, StorageError."""
        self.content.confirm()
        return replace(self.published, versions=self.content.versions)


def slug(name: str) -> str:
    """A model's name as one path component: letters, digits, dots, dashes; never empty, never hidden."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1]).strip(".-_")
    return words[:80] or NAMELESS


def checkpoint_path(model: str, scheme: Scheme, key: str) -> str:
    """The path of a checkpoint relative to the storage. It consists of a slug and hashes, and needs no escaping."""
    return f"checkpoints/{slug(model)}/{scheme.method}-{key[:16]}"


def adapter_path(base_path: str, recovery: Recovery, key: str) -> str:
    """The path of an adapter relative to the storage: beside the checkpoint that it belongs to."""
    return with_adapter_mark(base_path, f"{recovery.slug}-{key[:16]}")


def find_published(storage: Path, path: str, key: str, *, database: str | None = None) -> Verified | None:
    """The checkpoint at ``path`` if it exists, has this key, and every file matches the manifest; else None.

    A checkpoint that does not match is moved aside. ``database``: the one that is going to use it, so that no other
    database on the storage removes it. Raises StorageError if it cannot be read.
    """
    folder = storage / path
    _refuse_broken_link(folder.parent)
    doubted: _Identity | None = None
    for _ in range(_ATTEMPTS):
        try:
            judged = _identity(folder)
            if judged is None:
                return None
            manifest = Manifest.read(folder)
            is_its_own = manifest is not None and manifest.key == key
            if manifest is not None and not is_its_own and not path.endswith(key[:16]):
                return None  # the checkpoint is where it belongs, and was looked up with the key of another one
            if manifest is not None and is_its_own:
                mark_adopted(storage, path, manifest, database)
            if manifest is not None and not is_its_own:
                content, is_certain = None, True
            else:
                content, is_certain = _verified(folder, manifest) if manifest is not None else (None, False)
            is_still_there = _identity(folder) == judged
        except OSError as error:
            raise storage_error(error, "cannot verify a checkpoint") from error
        except StorageError as error:
            raise StorageError(f"cannot verify a checkpoint: {error}") from error
        if manifest is not None and content is not None:
            return Verified(published=_as_published(path, manifest, content), content=content)
        # Others may have moved it aside and published a new one meanwhile; then verify that one. Or they moved it aside
        # to remove it and back, as it was needed; then its files are there at a second look.
        if is_still_there and not is_certain and doubted != judged:
            doubted = judged
        elif is_still_there:
            _reject(folder, judged)
            return None
    raise StorageError(
        f"{path} changed its inode during each of {_ATTEMPTS} attempts to verify it: does its file system keep inodes?"
    )


def _refuse_broken_link(folder: Path) -> None:
    """Before anything is quantized: it could not be published there. Raises StorageError."""
    try:
        elsewhere = broken_link(folder)
    except OSError as error:
        raise storage_error(error, "cannot look for a checkpoint") from error
    if elsewhere is not None:
        raise StorageError(f"{folder} is a link to {elsewhere}, which is not there: mount it, or remove the link")


def problems(folder: Path) -> list[str]:
    """How a published checkpoint differs from its manifest, one line each; empty if it does not.

    The model card is not in the manifest, because users may edit it.
    """
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return [f"there is no valid {MANIFEST}"]
        found: dict[str, FileDigest | None] = dict.fromkeys(unpublished_files(folder, manifest.names))
        read = ((name, file_digest(folder, name)) for name in manifest.names)
        return manifest.differences(found | {name: digest for name, digest in read if digest is not None})
    except OSError as error:
        return [f"{error.filename or folder.name} cannot be read: {error.strerror}"]


def as_written(storage: Path, path: str) -> Verified:
    """The checkpoint that was just written, with the checksums of its manifest. Raises StorageError, OSError.

    None of its files counts as settled: whether it still has that content, only reading it can tell.
    """
    folder, mounts = storage / path, Mounts()
    manifest = Manifest.read(folder)
    if manifest is None:
        raise StorageError(f"{path} has no valid {MANIFEST} right after it was published")
    files = [
        HashedFile(
            name=digest.name,
            path=folder / digest.name,
            stat=stat_file(folder / digest.name, mounts),
            checksums=Checksums(chunk_sha256=digest.chunk_sha256, sha256=None),
            settled=False,
        )
        for digest in manifest.files
    ]
    for file, digest in zip(files, manifest.files, strict=True):
        if file.stat.size != digest.size:
            raise StorageError(f"{path}/{file.name} has {file.stat.size} bytes, but {digest.size} were written")
    content = Content(files, lambda: _existing(folder, manifest), NoDigestCache())
    return Verified(published=_as_published(path, manifest, content), content=content)


_Identity = tuple[int, int]


def _identity(folder: Path) -> _Identity | None:
    """The device and inode of a folder; None if it does not exist. Raises OSError."""
    try:
        result = folder.stat()
    except FileNotFoundError:
        return None
    return (result.st_dev, result.st_ino) if stat.S_ISDIR(result.st_mode) else None


def _verified(folder: Path, manifest: Manifest) -> tuple[Content | None, bool]:
    """The content of the files that the manifest names, read anew; None where it is not what was published.

    Also whether that is certain: all files were there, and did not change while they were read.
    """
    try:
        content = hash_content(lambda: _existing(folder, manifest), NoDigestCache())
    except (SourceChanged, FileNotFoundError):  # a file was removed, or is being written
        return None, False
    return (None if manifest.differences({file.name: file.digest for file in content.files}) else content), True


def _existing(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """The files of the manifest, and any others, so that these are noticed now and when the content is confirmed."""
    return {name: folder / name for name in (*manifest.names, *unpublished_files(folder, manifest.names))}


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


def file_digest(folder: Path, name: str) -> FileDigest | None:
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

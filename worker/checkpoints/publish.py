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
from qbatch.core.filesystem import IS_TAKEN, Refusal, move, share, sync
from qbatch.core.manifest import MANIFEST, Manifest
from qbatch.core.storage import CARD, strangers
from qbatch.worker.checkpoints.sidecars import copy_sidecars
from qbatch.worker.files.content import Content, NoDigestCache, hash_content
from qbatch.worker.files.staging import storage_error

_MANIFEST_VERSION = 1
# Each but the last found that others had moved a damaged checkpoint aside and put another in its place.
_LOOKS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A checkpoint in its place. ``path`` is relative to the storage; ``disk_bytes`` are its weights'. ``versions`` are
    the states in which its files were verified (see ``Content.versions``)."""

    key: str
    path: str
    root_sha256: str
    disk_bytes: int
    audit: Mapping[str, Any]
    quantize_s: float | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A published checkpoint, and its files as they were when every one of them matched its manifest."""

    published: Published
    content: Content

    def confirm(self) -> Published:
        """What is to be remembered of it once it was used. Raises SourceChanged, StorageError."""
        self.content.confirm()
        return replace(self.published, versions=self.content.versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a manifest says of where a checkpoint came from."""

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
    """Where a checkpoint of that key lies, relative to the storage: a slug and hashes, nothing of the user's."""
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
    """Complete the staged ``folder`` and move it to its place. ``files`` are those that the writer hashed itself;
    ``confirm`` is called once the source is used no more, and what it raises leaves nothing published.

    Of two writers the first rename wins; the loser adopts what the winner published, if it verifies.
    Raises DiskFull, StorageError, or Unsupported for what lies beside the weights.
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
    """The checkpoint at ``path``, if it is there, is that key's, and every file matches its manifest.

    What is there and does not is moved aside. Raises StorageError where that cannot be told.
    """
    folder = storage / path
    for _ in range(_LOOKS):
        try:
            judged = _identity(folder)
            if judged is None:
                return None
            manifest = Manifest.read(folder)
            is_its_own = manifest is not None and manifest.key == key
            if manifest is not None and not is_its_own and not path.endswith(key[:16]):
                return None  # it lies in its own place, and was looked up under another's key
            content = _verified(folder, manifest) if manifest is not None and is_its_own else None
            is_still_there = _identity(folder) == judged
        except OSError as error:
            raise storage_error(error, "cannot verify a checkpoint") from error
        except StorageError as error:
            raise StorageError(f"cannot verify a checkpoint: {error}") from error
        if manifest is not None and content is not None:
            return Verified(published=_as_published(path, manifest, content), content=content)
        # Another verifier may have moved it aside meanwhile, and a writer put a fresh one in its place: look again.
        if is_still_there:
            _reject(folder, judged)
            return None
    raise StorageError(f"{path} was another folder at each of {_LOOKS} looks: is its inode not its own for long?")


_Identity = tuple[int, int]


def _identity(folder: Path) -> _Identity | None:
    """The file system and inode of a folder; None where there is none. Raises OSError."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISDIR(found.st_mode) else None


def _verified(folder: Path, manifest: Manifest) -> Content | None:
    """The content of the files that the manifest names, read anew; None where it is not what was published."""
    try:
        # A file too many is one of them too: it is not what was published, now or after it was used.
        content = hash_content(
            lambda: {name: folder / name for name in (*manifest.names, *strangers(folder, manifest.names))},
            NoDigestCache(),
        )
    except (SourceChanged, FileNotFoundError):  # it went away, or is being written
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
    """What of a published checkpoint differs from its manifest, one line each; empty for a sound one.

    The model card is not in the manifest: people may edit it.
    """
    try:
        manifest = Manifest.read(folder)
        if manifest is None:
            return [f"no {MANIFEST} of qbatch's"]
        found: dict[str, FileDigest | None] = dict.fromkeys(strangers(folder, manifest.names))
        read = ((name, _digest(folder, name)) for name in manifest.names)
        return manifest.differences(found | {name: digest for name, digest in read if digest is not None})
    except OSError as error:
        return [f"{error.filename or folder.name} cannot be read: {error.strerror}"]


def _digest(folder: Path, name: str) -> FileDigest | None:
    """None for a file that is not there. Raises OSError for one that cannot be read now: it may be sound."""
    try:
        digest = digest_file(folder / name)
    except FileNotFoundError:
        return None
    return FileDigest(name=name, size=digest.size, chunk_sha256=digest.chunk_sha256)


def _reject(folder: Path, judged: _Identity) -> None:
    """Move a checkpoint that does not verify aside, so that it is neither adopted nor lost."""
    aside = folder.with_name(f"{folder.name}.rejected-{time.time_ns()}")
    try:
        folder.rename(aside)
        if _identity(aside) != judged:  # a fresh one, that had taken its place at the last moment
            aside.rename(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "cannot move a damaged checkpoint aside") from error


def _complete(folder: Path, files: Sequence[FileDigest]) -> list[FileDigest]:
    known = {digest.name: digest for digest in files}
    names = sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {CARD})
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
    """Folders were made by us, with what umask, default ACLs and the set-group-ID bit give them."""
    shared = [share(path) for path in folder.rglob("*") if path.is_file()]
    return frozenset(refusal for refusal in shared if refusal is not None)


def _move_into_place(folder: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        move(folder, place)
    except OSError as error:
        if error.errno not in IS_TAKEN:
            raise
        # Another writer was first. The caller verifies what it published.
        shutil.rmtree(folder)
    sync(place.parent)

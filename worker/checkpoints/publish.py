"""Publish a checkpoint: complete what was staged, describe it by a manifest, and rename it into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbatch.core.digest import CHUNK_BYTES, FileDigest, root_sha256
from qbatch.core.domain import DType, Scheme
from qbatch.core.errors import StorageError
from qbatch.core.filesystem import OCCUPIED_ERRNOS, Refusal, add_default_permissions, move, sync
from qbatch.core.manifest import MANIFEST
from qbatch.core.storage import MODEL_CARD
from qbatch.worker.checkpoints.card_file import write_first_card
from qbatch.worker.checkpoints.published import (
    Published,
    Verified,
    adapter_path,
    as_written,
    checkpoint_path,
    file_digest,
    find_published,
)
from qbatch.worker.checkpoints.sidecars import copy_sidecars
from qbatch.worker.files.staging import storage_error

_MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The origin of a checkpoint, as recorded in its manifest. ``database`` is the id of the job's database."""

    model: str
    revision: str | None
    fingerprint: str
    scheme: Scheme
    dtype: DType
    device_kind: str
    device_name: str
    versions: Mapping[str, str]
    database: str | None = None


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
    it raises, nothing is published. The files are not read here: their checksums were made while they were
    written, and ``Verified.confirm`` reads them after their use. If two writers publish the same checkpoint, the first
    rename wins, and the other one reads that checkpoint and uses it if it verifies. Raises DiskFull, StorageError, or
    Unsupported if the files next to the weights are too large.
    """

    def complete() -> None:
        copy_sidecars(source, folder)
        _write_card(folder, origin)
        confirm()

    return _publish(
        folder,
        storage,
        checkpoint_path(origin.model, origin.scheme, key),
        _Contents(key=key, origin=origin, files=files, audit=audit, quantize_s=quantize_s),
        complete,
    )


def publish_adapter(
    folder: Path,
    *,
    storage: Path,
    base: Published,
    key: str,
    origin: Origin,
    audit: Mapping[str, Any],
    recover_s: float,
    confirm: Callable[[], None],
) -> Verified:
    """Publish the adapter in ``folder`` beside the checkpoint ``base`` that it belongs to, and that its manifest names.

    ``confirm`` is called after the last use of the source and of ``base``.
    """

    def complete() -> None:
        _write_card(folder, origin)
        confirm()

    recovery = origin.scheme.recovery
    if recovery is None:
        raise ValueError(f"{folder} is no adapter")
    named = {"key": base.key, "name": Path(base.path).name, "root_sha256": base.root_sha256}
    return _publish(
        folder,
        storage,
        adapter_path(base.path, recovery, key),
        _Contents(key=key, origin=origin, files=(), audit=audit, quantize_s=recover_s, base=named),
        complete,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What a manifest says. ``files``: those that are hashed already. ``base``: of an adapter, what it belongs to."""

    key: str
    origin: Origin
    files: Sequence[FileDigest]
    audit: Mapping[str, Any]
    quantize_s: float
    base: Mapping[str, str] | None = None


def _write_card(folder: Path, origin: Origin) -> None:
    write_first_card(
        folder,
        model=origin.model,
        is_of_hub=origin.revision is not None,
        scheme=origin.scheme,
        dtype=origin.dtype,
    )


def _publish(folder: Path, storage: Path, path: str, contents: _Contents, complete: Callable[[], None]) -> Verified:
    try:
        complete()
        digests = _complete(folder, contents.files)
        refused = _set_modes(folder) | sync(*folder.rglob("*"), folder)
        _write_manifest(folder, contents, digests=digests, refused=refused)
        sync(folder / MANIFEST, folder)
        if _move_into_place(folder, storage / path):
            return as_written(storage, path)
    except OSError as error:
        raise storage_error(error, "cannot publish") from error
    verified = find_published(storage, path, contents.key, database=contents.origin.database)
    if verified is None:
        raise StorageError(f"{path} does not verify right after it was published")
    return verified


def _complete(folder: Path, files: Sequence[FileDigest]) -> list[FileDigest]:
    known = {digest.name: digest for digest in files}
    names = sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MODEL_CARD})
    digests = []
    for name in names:
        digest = known.get(name) or file_digest(folder, name)
        if digest is None:
            raise StorageError(f"{name} vanished while it was being published")
        digests.append(digest)
    return digests


def _write_manifest(
    folder: Path, contents: _Contents, *, digests: Sequence[FileDigest], refused: Iterable[Refusal]
) -> None:
    origin = contents.origin
    manifest = {
        "qbatch_manifest": _MANIFEST_VERSION,
        "key": contents.key,
        **({} if contents.base is None else {"base": dict(contents.base)}),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"model": origin.model, "revision": origin.revision, "fingerprint": origin.fingerprint},
        "scheme": origin.scheme.to_json(),
        "dtype": origin.dtype,
        "device": {"kind": origin.device_kind, "name": origin.device_name},
        "versions": dict(origin.versions),
        "database": origin.database,
        "quantize_s": contents.quantize_s,
        "audit": dict(contents.audit),
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


def _move_into_place(folder: Path, target: Path) -> bool:
    """Whether the checkpoint is this one; False if another writer has published it first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        move(folder, target)
        is_first = True
    except OSError as error:
        if error.errno not in OCCUPIED_ERRNOS:
            raise
        is_first = False
        shutil.rmtree(folder)
    sync(target.parent)
    return is_first

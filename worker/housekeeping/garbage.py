"""``qbatch gc``: remove from the storage what no job, no record and no other database needs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from qbatch.core.domain import Token
from qbatch.core.manifest import Manifest
from qbatch.core.settings import Settings
from qbatch.core.storage import missing_checkpoints
from qbatch.models_db import jobs
from qbatch.models_db.checkpoint_needs import users_of
from qbatch.models_db.database_id import database_id, take_turns
from qbatch.models_db.gone_checkpoints import find_missing, note_missing
from qbatch.models_db.retention import ended_before, needed_since
from qbatch.models_db.session import Database
from qbatch.worker.checkpoints.ownership import own_marks
from qbatch.worker.files.own_staging import is_dead, remove_if_empty
from qbatch.worker.files.staging import KEPT_TRAININGS, stale_folders, unstage
from qbatch.worker.housekeeping.checkpoint_remover import StoredCheckpoint, remover
from qbatch.worker.housekeeping.holdings import Holding, HoldingKind, age_s, find_holdings
from qbatch.worker.housekeeping.stale_files import (
    MOVED_ASIDE,
    Pruned,
    aside_of,
    base_outputs,
    is_older,
    old_logs,
    rejected_checkpoints,
    remove_each,
    remove_folder,
)

# After this long nobody moves a checkpoint back any more that another database wanted to remove.
_FORGOTTEN_S = 86_400.0


def collect_garbage(
    database: Database, settings: Settings, older_than_s: float, *, dry_run: bool = True
) -> list[Pruned]:
    """Remove what is not needed, or report what would be removed. Safe while workers run, and after it was killed.

    What may still be of use is kept until it is ``older_than_s``: damaged checkpoints, unreferenced ones, baseline
    outputs, trainings that were not finished, and the logs of jobs that ended. Raises DatabaseUnreachable, OSError.
    """
    before_s = time.time() - older_than_s
    with database.read() as session:
        own = database_id(session)
        needed_s = needed_since(session, older_than_s).timestamp()
        ended = ended_before(session, older_than_s)
    holdings = find_holdings(database, settings)
    unreferenced = remover(database, settings).remove_all(
        _unreferenced(settings, holdings, older_than_s), dry_run=dry_run, what=HoldingKind.UNREFERENCED.value
    )
    return [
        _staging(database, settings.staging_of(own), settings.storage, dry_run=dry_run),
        remove_each(
            "unfinished trainings",
            _old_trainings(settings.staging_of(own), before_s),
            remove_folder,
            settings.storage,
            dry_run=dry_run,
        ),
        _half_removed(database, settings, holdings, own, dry_run=dry_run),
        unreferenced,
        rejected_checkpoints(settings, before_s, own, dry_run=dry_run),
        base_outputs(settings, needed_s, dry_run=dry_run),
        remove_each(
            HoldingKind.LOGS.value,
            old_logs(database, settings.logs_of(own), before_s, ended),
            Path.unlink,
            settings.storage,
            dry_run=dry_run,
        ),
        _missing(database, settings, dry_run=dry_run),
        remove_each(
            "marks on checkpoints of other databases",
            _unused_marks(database, settings.storage, own, before_s),
            Path.unlink,
            settings.storage,
            dry_run=dry_run,
        ),
    ]


def _unused_marks(database: Database, storage: Path, own: str, before_s: float) -> Iterator[Path]:
    """Marks on checkpoints of which no job of this database is left: while they stand, nobody else can remove those.

    A job's key is recorded before its worker renews the mark, so one that has no job and is old has no use.
    """
    old = {path: mark for path, mark in own_marks(storage, own) if is_older(mark, before_s)}
    missing = missing_checkpoints(storage, old)
    for path, mark in old.items():
        manifest = None if path in missing else Manifest.read(storage / path)
        if path in missing or (manifest is not None and not _has_users(database, manifest.key)):
            yield mark


def _has_users(database: Database, key: str) -> bool:
    with database.read() as session:
        return bool(users_of(session, [key]))


def _missing(database: Database, settings: Settings, *, dry_run: bool) -> Pruned:
    missing = (find_missing if dry_run else note_missing)(database, settings.storage)
    return Pruned(what="missing checkpoints, recorded", number=len(missing), paths=tuple(sorted(missing)))


def _unreferenced(settings: Settings, holdings: Iterable[Holding], older_than_s: float) -> list[StoredCheckpoint]:
    chosen = []
    for holding in holdings:
        if holding.kind is not HoldingKind.UNREFERENCED or holding.key is None:
            continue
        with suppress(FileNotFoundError):
            if age_s(settings.storage / holding.path) > older_than_s:
                chosen.append(
                    StoredCheckpoint(
                        path=holding.path,
                        key=holding.key,
                        method=holding.scheme,
                        only_of=frozenset(),
                        is_unknown=True,
                    )
                )
    return chosen


def _half_removed(
    database: Database, settings: Settings, holdings: Sequence[Holding], own: str, *, dry_run: bool
) -> Pruned:
    def remove(folder: Path) -> None:
        aside = aside_of(folder.with_name(_former_name(folder)), own)
        with database.write() as session:
            take_turns(session)
            folder.rename(aside)
        remove_folder(aside)

    folders = [settings.storage / holding.path for holding in holdings if _is_left(holding, own)]
    return remove_each(HoldingKind.HALF_REMOVED.value, folders, remove, settings.storage, dry_run=dry_run)


def _former_name(folder: Path) -> str:
    match = MOVED_ASIDE.fullmatch(folder.name)
    return folder.name if match is None else match[1]


def _is_left(holding: Holding, own: str) -> bool:
    match = MOVED_ASIDE.fullmatch(Path(holding.path).name)
    return match is not None and (match[2] == own or time.time() - int(match[3]) / 1e9 > _FORGOTTEN_S)


def _staging(database: Database, folder: Path, storage: Path, *, dry_run: bool) -> Pruned:
    """What dead workers of this database have left. A living one cleans up after itself."""
    if not folder.is_dir():
        return Pruned(what=HoldingKind.STAGING.value, number=0, size_bytes=0)

    def running(tokens: Iterable[Token]) -> frozenset[int]:
        with database.read() as session:
            return jobs.held(session, tokens)

    now = time.time() if dry_run else _storage_time(folder)
    dead = [path for path in sorted(folder.iterdir()) if path.is_dir() and is_dead(path, now)]
    removed = remove_each(HoldingKind.STAGING.value, stale_folders(dead, running), unstage, storage, dry_run=dry_run)
    if not dry_run:
        for path in dead:
            remove_if_empty(path)
    return removed


def _old_trainings(staging: Path, before_s: float) -> list[Path]:
    """The folders of trainings that no attempt has continued since then."""
    kept = sorted((staging / KEPT_TRAININGS).glob("*"))
    return [folder for folder in kept if not any(file.stat().st_mtime >= before_s for file in folder.iterdir())]


def _storage_time(folder: Path) -> float:
    """The time by the storage's own clock, which dates the heartbeats of workers. Raises OSError."""
    probe = folder / f".clock-{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)

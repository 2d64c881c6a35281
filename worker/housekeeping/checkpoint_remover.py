"""Removes checkpoints from the storage, with their records, such that nobody who needs one loses it.

A checkpoint is moved aside within the transaction that records its end, and looked at twice: before that, and after.
Removals of a database take turns until then, so none takes for half-removed what another one may still move back.
A worker records a job's key before it looks for the checkpoint. So if a job comes to need it at that moment, either
its key is seen and the checkpoint is moved back, or the job does not find it and makes it anew. For jobs of other
databases, marks do the same (see ``ownership``). Killed midway, it leaves what was moved aside, which ``gc`` removes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from qbatch.core.domain import format_job_id
from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.filesystem import OCCUPIED_ERRNOS, move
from qbatch.core.settings import Settings
from qbatch.core.storage import CHECKPOINTS, base_path, missing_checkpoints
from qbatch.models_db import checkpoints
from qbatch.models_db.checkpoint_needs import users_of, why_needed
from qbatch.models_db.database_id import database_id, take_turns
from qbatch.models_db.session import Database
from qbatch.models_db.write_lock import pausing_afterwards
from qbatch.worker.checkpoints.ownership import remove_mark, why_not_ours
from qbatch.worker.housekeeping.stale_files import (
    REJECTED,
    Pruned,
    aside_of,
    remove_folder,
    size_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint to remove. ``path`` is relative to the storage; ``method`` is None where it is not known.

    ``only_of``: it stays if any other job than these has it, ended or not; None if that does not matter.
    ``is_unknown``: it stays if it is on record by now.
    """

    path: str
    key: str
    method: str | None
    only_of: frozenset[int] | None = None
    is_unknown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRemover:
    """Removes checkpoints for the database ``own``. ``but_for`` are jobs whose need does not count."""

    database: Database
    storage: Path
    own: str
    spooled: frozenset[str]
    but_for: frozenset[int] = frozenset()

    def remove_all(self, chosen: Iterable[StoredCheckpoint], *, dry_run: bool, what: str = "checkpoints") -> Pruned:
        """Remove those that nobody needs, or report which would be removed, adapters before the checkpoints that they
        belong to. Raises DatabaseUnreachable."""
        sizes: list[int] = []
        gone: list[str] = []
        kept: list[tuple[str, str]] = []
        problems: list[str] = []
        sees_storage = (self.storage / CHECKPOINTS).is_dir()
        for one in sorted(chosen, key=lambda one: base_path(one.path) is None):
            try:
                nbytes = size_of(self.storage / one.path)
                why = self.why_kept(one, going=gone) if dry_run else self.remove(one)
            except FileNotFoundError:
                if not sees_storage:
                    problems.append(f"{one.path} is not to be seen: {self.storage} has no folder {CHECKPOINTS}")
                elif not dry_run:
                    self._note_gone(one)
                continue
            except OSError as error:
                problems.append(f"{error.filename or one.path} cannot be removed: {error.strerror}")
                continue
            if why is not None:
                kept.append((one.path, why))
                continue
            sizes.append(nbytes)
            gone.append(one.path)
        return Pruned(
            what=what,
            number=len(gone),
            size_bytes=sum(sizes),
            problems=tuple(problems),
            paths=tuple(gone),
            kept=tuple(kept),
        )

    def _note_gone(self, one: StoredCheckpoint) -> None:
        """Record that somebody has removed it already."""
        with self.database.write() as session:
            checkpoints.checkpoints_at(session, [one.path], lock=True)
            if missing_checkpoints(self.storage, [one.path]):
                checkpoints.take_out(session, one.path)

    def why_kept(self, one: StoredCheckpoint, *, going: Collection[str] = ()) -> str | None:
        """Why it would not be removed if those at the paths ``going`` were; None if it would. Raises
        DatabaseUnreachable, OSError."""
        with self.database.read() as session:
            return self._why_kept(session, one, going=going)

    def remove(self, one: StoredCheckpoint) -> str | None:
        """Remove it; or return why it stays. Raises DatabaseUnreachable, OSError."""
        folder = self.storage / one.path
        aside = aside_of(folder, self.own)
        try:
            with pausing_afterwards(), self.database.write() as session:
                why = self._move_aside(session, one, folder, aside)
        except DatabaseUnreachable:
            _move_back(aside, folder)
            raise
        if why is None:
            remove_mark(self.storage, one.path, self.own)
            remove_folder(aside)
        return why

    def _move_aside(self, session: Session, one: StoredCheckpoint, folder: Path, aside: Path) -> str | None:
        take_turns(session)
        checkpoints.checkpoints_at(session, [one.path], lock=True)
        why = self._why_kept(session, one)
        if why is not None:
            return why
        move(folder, aside)
        is_going = False
        try:
            why = self._why_kept(session, one, aside)
            if why is None:
                checkpoints.take_out(session, one.path)
                is_going = True
        finally:
            if not is_going:  # it is needed, or that could not be found out
                _move_back(aside, folder)
        return why

    def _why_kept(
        self, session: Session, one: StoredCheckpoint, folder: Path | None = None, going: Collection[str] = ()
    ) -> str | None:
        if one.key in self.spooled:
            return "an outcome in this machine's spool is of it"
        needed = why_needed(session, one.key, name=Path(one.path).parent.name, method=one.method, but_for=self.but_for)
        known = needed or _why_known(session, one) or why_not_ours(self.storage, one.path, self.own, folder=folder)
        return known or self._why_adapted(one.path, going)

    def _why_adapted(self, path: str, going: Collection[str]) -> str | None:
        """An adapter is of no use without the checkpoint that it belongs to."""
        staying = [adapter for adapter in adapters_beside(self.storage, path) if adapter not in going]
        return f"its adapter {Path(staying[0]).name} needs it" if staying else None


def _why_known(session: Session, one: StoredCheckpoint) -> str | None:
    """Why it is not what it was taken for when it was chosen; None if it is."""
    if one.is_unknown and any(row.gone_at is None for row in checkpoints.checkpoints_at(session, [one.path])):
        return "it is on record by now"
    if one.only_of is None:
        return None
    users = users_of(session, [one.key]).get(one.key, ())
    others = [user.job_id for user in users if user.job_id not in one.only_of]
    return f"{format_job_id(others[-1])} has it too" if others else None


def remover(database: Database, settings: Settings, *, but_for: Iterable[int] = ()) -> CheckpointRemover:
    """Raises DatabaseUnreachable."""
    with database.read() as session:
        own = database_id(session)
    return CheckpointRemover(
        database=database,
        storage=settings.storage,
        own=own,
        spooled=_spooled_keys(settings.spool),
        but_for=frozenset(but_for),
    )


def _spooled_keys(spool: Path) -> frozenset[str]:
    """The keys of the checkpoints of outcomes that the database has not taken yet, those set aside included."""
    found = set()
    for path in (*spool.glob("*.json"), *spool.glob("*.rejected")):
        # Recorded by a worker meanwhile, or not an outcome, which no worker can record either.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            found.add(str(json.loads(path.read_text())["checkpoint"]["key"]))
    return frozenset(found)


def adapters_beside(storage: Path, path: str) -> list[str]:
    """The paths of the adapters that belong to the checkpoint at ``path``, but for damaged ones. Raises OSError."""
    folder = (storage / path).parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    parent = Path(path).parent
    paths = (str(parent / name) for name in names if not REJECTED.fullmatch(name))
    return [other for other in paths if base_path(other) == path]


def _move_back(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except FileNotFoundError:  # it was not moved yet
        return
    except OSError as error:
        if error.errno not in OCCUPIED_ERRNOS:  # a new one was published meanwhile
            raise

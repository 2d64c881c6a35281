"""``qbatch rm``: remove batches, jobs or checkpoints.

Of a batch or job, the rows go, with its logs and the checkpoints that no other job refers to. Of a checkpoint, the
folder goes and the rows of results stay, without a path. The checkpoints go first: killed in between, rows without
paths are left, and the same command finishes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, format_batch_id, format_job_id
from qbatch.core.errors import UsageError
from qbatch.core.job_log import is_of_runner, job_of_log
from qbatch.core.settings import Settings
from qbatch.core.storage import base_path
from qbatch.models_db.checkpoint_needs import CheckpointUser, users_of
from qbatch.models_db.checkpoints import all_checkpoints, checkpoints_at, forget_unused
from qbatch.models_db.database_id import database_id
from qbatch.models_db.named_jobs import is_named
from qbatch.models_db.retention import answered_elsewhere, delete_empty, delete_named
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Checkpoint, Job
from qbatch.models_db.write_lock import pausing_afterwards
from qbatch.worker.housekeeping.checkpoint_remover import StoredCheckpoint, remover
from qbatch.worker.housekeeping.stale_files import Pruned, chunks, remove_each


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What goes with some batches, jobs and checkpoints.

    ``staying``: jobs that must stay, because their results answer others; each with one of those. ``checkpoints`` are
    those to look at; what a job that stays refers to is in ``shared``, with the reason. ``paths`` are those of each
    job, whose records go with the last job that has them.
    """

    batch_ids: tuple[int, ...]
    job_ids: tuple[int, ...]
    staying: Mapping[int, int]
    checkpoints: tuple[StoredCheckpoint, ...]
    shared: tuple[tuple[str, str], ...]
    paths: Mapping[int, Sequence[str]]
    logs: tuple[Path, ...]

    @property
    def remarks(self) -> list[str]:
        return [
            f"{format_job_id(job_id)} stays, because its result answers {format_job_id(other)}"
            for job_id, other in sorted(self.staying.items())
        ]


def plan_removal(
    database: Database,
    settings: Settings,
    *,
    batch_ids: Sequence[int] = (),
    job_ids: Sequence[int] = (),
    paths: Collection[str] = (),
    within: Collection[int] = (),
) -> Removal:
    """Find out what goes. ``paths`` are of checkpoints, relative to the storage, whose adapters go with them. If there
    are batches ``within``, those stay that jobs of other batches have too, and what no path names.

    Raises DatabaseUnreachable, and UsageError for jobs that have not ended and for checkpoints that are not recorded.
    """
    with database.read() as session:
        jobs = _jobs(session, batch_ids, job_ids)
        staying = answered_elsewhere(session, [job.id for job in jobs])
        going = [job for job in jobs if job.id not in staying]
        named = checkpoints_at(session, paths if within else _with_adapters(session, paths))
        if unknown := sorted(set(paths) - {row.path for row in named}):
            raise UsageError(f"{unknown[0]} is not a checkpoint that this database has on record")
        rows, shared = _of_jobs(session, going)
        path_of = {row.key: row.path for row in rows}
        users = users_of(session, [row.key for row in (*rows, *named)])
        ids = frozenset(job.id for job in going)
        checkpoints = [
            *(_stored(row, users.get(row.key, ()), only_of=ids) for row in rows if row.gone_at is None),
            *(
                _stored(row, users.get(row.key, ()), only_of=_of_batches(users.get(row.key, ()), within))
                for row in named
            ),
        ]
        logs = tuple(_logs(settings.logs_of(database_id(session)), ids, _without_mates(session, going)))
    return Removal(
        batch_ids=tuple(batch_ids),
        # Those that others answer go first: a job that answers another cannot go before it.
        job_ids=tuple(job.id for job in sorted(going, key=lambda job: (job.reused_from is None, job.id))),
        staying=staying,
        checkpoints=tuple({one.path: one for one in checkpoints}.values()),
        shared=tuple(shared),
        paths={job.id: [path_of[key] for key in _keys_of(job) if key in path_of] for job in going},
        logs=logs,
    )


def carry_out(database: Database, settings: Settings, removal: Removal, *, dry_run: bool) -> list[Pruned]:
    """Remove it, or report what would be removed. Where a checkpoint cannot be removed, the rows stay.

    Raises DatabaseUnreachable, OSError.
    """
    jobs, batches = set(removal.job_ids), 0 if removal.staying else len(removal.batch_ids)
    taker = remover(database, settings, but_for=removal.job_ids)
    checkpoints = taker.remove_all(removal.checkpoints, dry_run=dry_run)
    if checkpoints.problems:
        return [checkpoints]
    if not dry_run:
        jobs, batches = _delete_rows(database, removal)
    logs = removal.logs
    return [
        Pruned(what="batches", number=batches),
        Pruned(what="jobs", number=len(jobs), kept=_held(removal, jobs)),
        _with_kept(checkpoints, removal.shared),
        remove_each("logs", logs, Path.unlink, settings.storage, dry_run=dry_run),
    ]


def _with_kept(pruned: Pruned, shared: Sequence[tuple[str, str]]) -> Pruned:
    return Pruned(
        what=pruned.what,
        number=pruned.number,
        size_bytes=pruned.size_bytes,
        problems=pruned.problems,
        paths=pruned.paths,
        kept=(*pruned.kept, *shared),
    )


def _held(removal: Removal, gone: Collection[int]) -> tuple[tuple[str, str], ...]:
    held = [job_id for job_id in removal.job_ids if job_id not in gone]
    return tuple((format_job_id(job_id), "another command is using it: remove it again") for job_id in sorted(held))


def _delete_rows(database: Database, removal: Removal) -> tuple[set[int], int]:
    """Returns the jobs that are gone, and how many batches are."""
    jobs, batches = set[int](), 0
    for job_ids in chunks(removal.job_ids):
        with pausing_afterwards(), database.write() as session:
            of_jobs = session.scalars(select(Job.batch_id).where(Job.id.in_(job_ids)).distinct()).all()
            jobs |= delete_named(session, job_ids)
            batches += delete_empty(session, of_jobs)
            forget_unused(session, {path for job_id in job_ids for path in removal.paths[job_id]})
    for batch_ids in chunks(removal.batch_ids):
        with database.write() as session:
            batches += delete_empty(session, batch_ids)
    return jobs, batches


def _with_adapters(session: Session, paths: Collection[str]) -> set[str]:
    """``paths``, and those of the adapters on record that belong to checkpoints at them."""
    if not paths:
        return set()
    return {*paths, *(row.path for row in all_checkpoints(session) if base_path(row.path) in paths)}


_JOB_COLUMNS = (Job.id, Job.batch_id, Job.bundle, Job.state, Job.checkpoint_key, Job.base_key, Job.reused_from)


def _jobs(session: Session, batch_ids: Sequence[int], job_ids: Sequence[int]) -> list[Any]:
    """Raises UsageError if one has not ended."""
    if not batch_ids and not job_ids:
        return []
    named = is_named(batch_ids, job_ids)
    jobs = list(session.execute(select(*_JOB_COLUMNS).where(named).order_by(Job.id)))
    open_ = [job for job in jobs if job.state in OPEN_STATES]
    if open_:
        counts = Counter(job.state for job in open_)
        text = " and ".join(f"{counts[state]} {state}" for state in sorted(counts, reverse=True))
        of_batches = dict.fromkeys(format_batch_id(job.batch_id) for job in open_ if job.batch_id in batch_ids)
        names = " ".join(of_batches or [format_job_id(job.id) for job in open_])
        raise UsageError(f"{names}: {text} (`qbatch cancel {names}` first)")
    return jobs


def _of_jobs(session: Session, jobs: Sequence[Any]) -> tuple[list[Checkpoint], list[tuple[str, str]]]:
    """The recorded checkpoints of these jobs that no other job refers to; and the others, with the reason."""
    ids = {job.id for job in jobs}
    keys = sorted({key for job in jobs for key in _keys_of(job)})
    alone: list[Checkpoint] = []
    shared: list[tuple[str, str]] = []
    users = users_of(session, keys)
    for chunk in chunks(keys):
        for row in session.scalars(select(Checkpoint).where(Checkpoint.key.in_(chunk)).order_by(Checkpoint.path)):
            others = [user for user in users.get(row.key, ()) if user.job_id not in ids]
            if others:
                shared.append((row.path, f"{format_job_id(others[-1].job_id)} has it too"))
            else:
                alone.append(row)
    return alone, shared


def _keys_of(job: Any) -> list[str]:
    """Of its checkpoint; of an adapter, and of the checkpoint that it belongs to."""
    return [key for key in (job.checkpoint_key, job.base_key) if key is not None]


def _of_batches(users: Sequence[CheckpointUser], batch_ids: Collection[int]) -> frozenset[int] | None:
    """The jobs of these batches among ``users``; None if no batches are named."""
    return frozenset(user.job_id for user in users if user.batch_id in batch_ids) if batch_ids else None


def _stored(
    row: Checkpoint, users: Sequence[CheckpointUser], only_of: frozenset[int] | None = None
) -> StoredCheckpoint:
    return StoredCheckpoint(path=row.path, key=row.key, method=users[0].method if users else None, only_of=only_of)


def _without_mates(session: Session, jobs: Sequence[Any]) -> set[int]:
    """The ids of the ``jobs`` whose bundles have no other jobs."""
    ids, shared = {job.id for job in jobs}, set[str]()
    for chunk in chunks(sorted({job.bundle for job in jobs})):
        rows = session.execute(select(Job.id, Job.bundle).where(Job.bundle.in_(chunk)))
        shared.update(bundle for job_id, bundle in rows if job_id not in ids)
    return {job.id for job in jobs if job.bundle not in shared}


def _logs(folder: Path, job_ids: Collection[int], alone: Collection[int]) -> Iterator[Path]:
    """The logs of these jobs. What a runner printed is that of all jobs of its bundle, so only of those ``alone``."""
    return (
        path
        for path in sorted(folder.glob("*"))
        if job_of_log(path.name) in (alone if is_of_runner(path.name) else job_ids)
    )

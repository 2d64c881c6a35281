"""Find batches that are old enough to be pruned, and delete them in transactions of limited size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Select, case, delete, func, select, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import ENDED_STATES, OPEN_STATES
from qbatch.models_db.arrival_filter import ALSO_ARRIVING
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import NO_SYNC, in_chunks
from qbatch.models_db.tables import AnswersRow, Attempt, Batch, Checkpoint, Job, Result, SearchRow

# The ended states by name, because no index helps to find rows whose state is not among some values.
_Family = tuple[int, str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prunable:
    """What may be deleted: batches, and jobs in an order in which that is possible (those answered by others first)."""

    batch_ids: tuple[int, ...]
    job_ids: tuple[int, ...]


def find_prunable(session: Session, older_than_s: float) -> Prunable:
    """The batches whose last job finished longer than ``older_than_s`` ago, by the database's clock.

    A job whose result answers a kept job is kept too, together with the jobs of its batch for the same source: its
    baseline, and the job after which its log is named.
    """
    rows = session.execute(
        select(Job.id, Job.batch_id, Job.location, Job.revision, Job.reused_from)
        .where(Job.batch_id.in_(_old_batches(older_than_s)))
        .order_by(Job.id)
    ).all()
    families: dict[int, _Family] = {row.id: (row.batch_id, row.location, row.revision) for row in rows}
    answered_by = {row.id: row.reused_from for row in rows if row.reused_from is not None}
    kept = _kept(families, answered_by, _needed(session, older_than_s))
    doomed = [job_id for job_id, family in families.items() if family not in kept]
    return Prunable(
        batch_ids=tuple(sorted({family[0] for family in families.values()} - {family[0] for family in kept})),
        job_ids=(
            *(job_id for job_id in doomed if job_id in answered_by),
            *(job_id for job_id in doomed if job_id not in answered_by),
        ),
    )


def _old_batches(older_than_s: float) -> Select[int]:
    open_jobs = func.count(case((Job.state.in_(OPEN_STATES), 1)))
    ended_at = func.max(func.coalesce(Job.finished_at, Job.created_at))
    return select(Job.batch_id).group_by(Job.batch_id).having(open_jobs == 0, ended_at < db_now(-older_than_s))


def _needed(session: Session, older_than_s: float) -> set[int]:
    """The jobs whose results answer jobs of batches that are not old."""
    stays = Job.batch_id.not_in(_old_batches(older_than_s))
    referring = select(Job.reused_from).where(Job.reused_from.is_not(None), stays).distinct()
    found = session.scalars(referring, execution_options=ALSO_ARRIVING)
    return {job_id for job_id in found if job_id is not None}


def _kept(
    families: Mapping[int, _Family], answered_by: Mapping[int, int], needed: Iterable[int]
) -> Collection[_Family]:
    """The families of the ``needed`` jobs, of the jobs that answer members of those families, and so on."""
    members: dict[_Family, list[int]] = defaultdict(list)
    for job_id, family in families.items():
        members[family].append(job_id)
    kept: set[_Family] = set()
    todo = [job_id for job_id in needed if job_id in families]
    while todo:
        family = families[todo.pop()]
        if family not in kept:
            kept.add(family)
            answers = {answered_by[job_id] for job_id in members[family] if job_id in answered_by}
            todo += answers & families.keys()
    return kept


def delete_jobs(session: Session, job_ids: Sequence[int], older_than_s: float) -> int:
    """Delete these jobs with their attempts and results. Returns how many were deleted.

    Skips jobs that were retried or answer others by now, or that another transaction has locked. Checkpoint rows are
    kept, without a job.
    """
    ended = (Job.state.in_(ENDED_STATES), func.coalesce(Job.finished_at, Job.created_at) < db_now(-older_than_s))
    # SKIP LOCKED never waits, so it cannot deadlock. Once a job is locked, no other job can begin to refer to it.
    free = set(
        session.scalars(
            select(Job.id).where(Job.id.in_(job_ids), *ended).order_by(Job.id).with_for_update(skip_locked=True, of=Job)
        )
    )
    free -= _of_open_batches(session, free)
    # Separate statements, which see what was committed before the locks were acquired.
    while referred := _referred(session, free):
        free -= referred
    _delete(session, sorted(free))
    return len(free)


def _of_open_batches(session: Session, job_ids: Collection[int]) -> set[int]:
    rows = session.execute(select(Job.id, Job.batch_id).where(Job.id.in_(job_ids)))
    batches = {job_id: batch_id for job_id, batch_id in rows}
    is_open = select(Job.id).where(Job.batch_id == Batch.id, Job.state.in_(OPEN_STATES)).exists()
    open_ = set(session.scalars(select(Batch.id).where(Batch.id.in_(set(batches.values())), is_open)))
    return {job_id for job_id, batch_id in batches.items() if batch_id in open_}


def _referred(session: Session, job_ids: Collection[int]) -> set[int]:
    """The jobs among ``job_ids`` that answer a job outside of ``job_ids``."""
    others = select(Job.reused_from).where(Job.reused_from.in_(job_ids), Job.id.not_in(job_ids))
    found = session.scalars(others, execution_options=ALSO_ARRIVING)
    return {job_id for job_id in found if job_id is not None}


def _delete(session: Session, job_ids: Sequence[int]) -> None:
    for reference in (Checkpoint.job_id, SearchRow.job_id, Job.search_job_id):
        refers = update(reference.class_).where(reference.in_(job_ids)).values({reference: None})
        session.execute(refers, execution_options=NO_SYNC)
    for column in (AnswersRow.job_id, Result.job_id, Attempt.job_id, Job.id):
        session.execute(delete(column.class_).where(column.in_(job_ids)), execution_options=NO_SYNC)


def delete_empty(session: Session, batch_ids: Sequence[int]) -> int:
    """Delete the batches that have no jobs left. Returns how many were deleted."""
    has_jobs: ColumnElement[bool] = select(Job.id).where(Job.batch_id == Batch.id).exists()
    gone = session.scalars(
        delete(Batch).where(Batch.id.in_(batch_ids), ~has_jobs).returning(Batch.id), execution_options=NO_SYNC
    )
    return len(gone.all())


def delete_named(session: Session, job_ids: Collection[int]) -> set[int]:
    """Delete those of these jobs that have ended and answer no others, with attempts and results. Returns their ids.

    It waits for nobody, and leaves what others hold: a submit holds all that answers its jobs until its end, and two
    that wait for each other would end one of them.
    """
    ended = select(Job.id).where(Job.id.in_(job_ids), Job.state.in_(ENDED_STATES)).order_by(Job.id)
    free = set(session.scalars(ended.with_for_update(of=Job, skip_locked=True)))
    while referred := _referred(session, free):
        free -= referred
    _delete(session, sorted(free))
    return free


def answered_elsewhere(session: Session, job_ids: Collection[int]) -> dict[int, int]:
    """The jobs among ``job_ids`` whose results answer a job outside of ``job_ids``, each with one such job."""
    found: dict[int, int] = {}
    for chunk in in_chunks(sorted(job_ids)):
        query = select(Job.reused_from, Job.id).where(Job.reused_from.in_(chunk)).order_by(Job.id.desc())
        rows = session.execute(query, execution_options=ALSO_ARRIVING)
        found |= {job_id: other for job_id, other in rows if job_id is not None and other not in job_ids}
    return found


def ended_before(session: Session, older_than_s: float) -> set[int]:
    """The jobs that ended longer than ``older_than_s`` ago."""
    ended_at = func.coalesce(Job.finished_at, Job.created_at)
    return set(session.scalars(select(Job.id).where(Job.state.in_(ENDED_STATES), ended_at < db_now(-older_than_s))))


def existing(session: Session, job_ids: Collection[int]) -> set[int]:
    """The ids of the jobs that exist."""
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids))))


def needed_since(session: Session, older_than_s: float) -> datetime:
    """Baseline outputs that were last used before this time are needed by no kept batch and no open batch.

    An open batch may reuse the baseline of an older batch, and need the outputs that this one left on the storage.
    """
    old = _old_batches(older_than_s)
    other = aliased(Job)
    is_open = select(Job.batch_id).where(Job.state.in_(OPEN_STATES))
    moments = (
        select(db_now(-older_than_s)),
        select(func.min(Batch.created_at)).where(Batch.id.not_in(old)),
        select(func.min(other.started_at)).join(Job, Job.reused_from == other.id).where(Job.batch_id.in_(is_open)),
    )
    found = [session.execute(moment, execution_options=ALSO_ARRIVING).scalar_one() for moment in moments]
    return min(moment for moment in found if moment is not None)

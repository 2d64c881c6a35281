"""A search for the layers to keep at 16 bits: what it found is recorded, and jobs that publish its mixtures follow.

A search that is recorded stays open. It is queued, but nobody is to run it, as long as the job of one of its points is
open: the end of that job, whatever it is, decides in the same transaction what becomes of the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import OPEN_STATES, JobState, Method, Token, format_job_id
from qbatch.core.errors import BoundNotKept, JobError, job_error
from qbatch.core.measured.details import Details
from qbatch.core.retry_policy import MAY_STILL_SUCCEED
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.core.search.next_step import BoundMet, BoundMissed, PublishPoint, TriedPoint, next_step
from qbatch.core.search.search_request import SearchRequest
from qbatch.core.search.sensitivity import Estimate
from qbatch.models_db import searches
from qbatch.models_db.batches import add_jobs
from qbatch.models_db.jobs.device_blame import clear_device
from qbatch.models_db.jobs.transitions import close, locked, requeue
from qbatch.models_db.jobs.user_requests import retry
from qbatch.models_db.tables import Job, Result

_FROM_THE_SEARCH = (
    *("batch_id", "model", "location", "revision", "is_folder", "method", "bits", "dtype", "device", "protocol"),
    *("force", "allow_pickle", "priority", "time_limit_s"),
)


def searched(session: Session, token: Token, key: str, found: FinishedSearch) -> bool:
    """Record what a search found, and insert the job of the first point. Returns whether it counts, as ``succeed``
    does. If another search stored something under the same key meanwhile, that answers, unless this one was forced."""
    job = _unrecorded(session, token)
    if job is None:
        return False
    worker_id = job.worker_id
    _record(session, job, key, searches.add(session, key, job.id, found, again=job.force))
    clear_device(session, worker_id)
    return True


def answer_search(session: Session, token: Token, key: str, search_id: int) -> bool:
    """Record for a search what an earlier one found. Returns whether it counts, as ``searched`` does."""
    job = _unrecorded(session, token)
    if job is None:
        return False
    _record(session, job, key, search_id)
    return True


def answer_unclaimed_search(session: Session, job: Job, key: str, search_id: int) -> None:
    """Record what an earlier search found for one that nobody can have claimed yet."""
    _record(session, job, key, search_id)


def _unrecorded(session: Session, token: Token) -> Job | None:
    job = locked(session, token, JobState.RUNNING, JobState.QUEUED, JobState.FAILED)
    if job is None or job.search_id is not None:
        return None
    given_up = job.state == JobState.FAILED and job.error_kind not in MAY_STILL_SUCCEED
    return None if given_up else job


def _record(session: Session, job: Job, key: str, search_id: int) -> None:
    job.checkpoint_key = key
    job.search_id = search_id
    job.error_kind = job.error_message = job.finished_at = None
    requeue(session, job, outcome=JobState.SUCCEEDED, alone=False)
    advance(session, job)


def waits_for_points(job: Job) -> bool:
    """Whether the end of a point's job decides about this search."""
    is_given_up = job.state == JobState.FAILED and job.error_kind in MAY_STILL_SUCCEED
    return job.search_id is not None and (job.state == JobState.QUEUED or is_given_up)


def advance(session: Session, search: Job) -> None:
    """Do what follows from the points' jobs that have ended. The caller has locked the search, and none of them waits
    for its turn."""
    assert search.search is not None and search.search_id is not None  # noqa: S101, PT018  (the caller has looked)
    points = session.scalars(
        select(Job).where(Job.search_job_id == search.id).order_by(Job.id),
        execution_options={"populate_existing": True},
    ).all()
    if any(point.state in OPEN_STATES for point in points):
        return
    frontier = searches.find_frontier_of(session, search.search_id)
    bound = SearchRequest.from_json(search.search).bound
    tried = _tried(session, [point for point in points if point.state == JobState.SUCCEEDED])
    by_index = {point.point: point for point in points}
    step = next_step(frontier, bound, [*tried.values()])
    match step:
        case PublishPoint(index=index):
            _publish(session, search, frontier, index, by_index.get(index))
        case BoundMet(index=index):
            _answer(session, search, by_index[index])
        case BoundMissed(reason=reason):
            close(session, search, JobState.FAILED, BoundNotKept(reason))
        case _:
            assert_never(step)


def fail_with(session: Session, search: Job, point: Job) -> None:
    """The job of a point has failed, and so does its search."""
    close(session, search, JobState.FAILED, _pointer(point))


def _pointer(point: Job) -> JobError:
    kind = point.error_kind or BoundNotKept.kind
    return job_error(kind, f"{format_job_id(point.id)}, which publishes what it found, failed: {point.error_message}")


def _tried(session: Session, points: Sequence[Job]) -> Mapping[int, TriedPoint]:
    """The points that were published and measured, in that order, by their jobs."""
    measuring = {point.id: point.reused_from or point.id for point in points}
    rows = session.scalars(select(Result).where(Result.job_id.in_(measuring.values()))) if points else ()
    results = {row.job_id: row for row in rows}
    return {point.id: _as_tried(point, results[measuring[point.id]]) for point in points}


def _as_tried(point: Job, result: Result) -> TriedPoint:
    details = Details.from_json(result.details)
    texts = [details.quality, *(text.quality for text in (details.more_texts or {}).values())]
    return TriedPoint(
        index=point.point or 0,
        weights_bytes=result.weights_bytes,
        kl=_worst([_estimate(text.kl_mean, text.kl_mean_se) for text in texts]),
        ln_ppl_ratio=_worst([_estimate(text.ln_ppl_ratio, text.ln_ppl_ratio_se) for text in texts]),
        why_not_compared=next((text.reason for text in texts if text.reason is not None), None),
    )


def _worst(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The largest with its errors; None if one is not known, since nobody can say then whether it is the largest."""
    known = [estimate for estimate in estimates if estimate is not None]
    return max(known, key=lambda estimate: (estimate.upper, estimate.mean)) if len(known) == len(estimates) else None


def _estimate(mean: float | None, error: float | None) -> Estimate | None:
    return None if mean is None else Estimate(mean=mean, standard_error=error)


def _publish(session: Session, search: Job, frontier: Frontier, index: int, before: Job | None) -> None:
    """Queue the job of a point: a new one, or the one that failed or was cancelled before the search was retried."""
    if search.state != JobState.QUEUED:
        search.error_kind = search.error_message = search.finished_at = None
        requeue(session, search, outcome=JobState.SUCCEEDED, alone=False)
    if before is not None:
        retry(session, job_ids=[before.id])
        return
    add_jobs(session, [_point_row(session, search, frontier.points[index], index)])


def _point_row(session: Session, search: Job, point: FrontierPoint, index: int) -> dict[str, Any]:
    return {name: getattr(search, name) for name in _FROM_THE_SEARCH} | {
        "bundle": _bundle(session, search),
        "scheme": {**search.scheme, "skip_modules": list(point.skip_list or ())},
        "reused_from": None,
        "search_job_id": search.id,
        "point": index,
    }


def _bundle(session: Session, search: Job) -> str:
    """The bundle of the job that publishes a point: that of the search's baseline if that is still to be measured.

    The job is compared with the baseline, and a bundle is run by one worker, the baseline first.
    """
    baseline = session.scalars(
        select(Job)
        .where(Job.location == search.location, Job.method == Method.NONE, Job.state.in_(OPEN_STATES))
        .order_by(Job.id)
    )
    own = (search.batch_id, search.revision, search.dtype, search.protocol)
    fitting = (job.bundle for job in baseline if (job.batch_id, job.revision, job.dtype, job.protocol) == own)
    return next(fitting, search.bundle)


def _answer(session: Session, search: Job, point: Job) -> None:
    """The search ends with the result of this point's job, and is of the same scheme from now on."""
    search.reused_from = point.reused_from or point.id
    search.checkpoint_key = point.checkpoint_key
    search.scheme = point.scheme
    close(session, search, JobState.SUCCEEDED)

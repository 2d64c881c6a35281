"""Looks at batches again and again: what runs, what has happened since the last look, and who works."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, Select, select
from sqlalchemy.orm import Session

from qbatch.core.domain import (
    ENDED_STATES,
    LOST,
    DeviceKind,
    JobState,
    WorkerState,
    batch_number,
    format_batch_id,
    format_job_id,
)
from qbatch.core.job_progress import JobProgress
from qbatch.core.watched import Snapshot, WatchedBatch, WatchedJob, WatchedWorker
from qbatch.models_db.database_clock import SLACK_S, db_now
from qbatch.models_db.lacking_devices import lacking_devices
from qbatch.models_db.leases import LEAD, holder
from qbatch.models_db.listing import list_batches, list_workers
from qbatch.models_db.mixture_origins import MIXTURE_COLUMNS, mixture_origin
from qbatch.models_db.pauses import in_force
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Attempt, Job
from qbatch.models_db.time_left import TimeLeft, open_batches, time_left

# An estimate reads hundreds of rows, and a newer one is hardly better.
_JUDGE_S = 5.0
# A batch of thousands may be cancelled at once.
_MOST_NEWS = 50
_SLACK = timedelta(seconds=SLACK_S)

_JOB = select(
    *(Job.id, Job.model, Job.method, Job.recovery, Job.state, Job.stage, Job.progress, Job.work_started),
    *(Job.finished_at, Job.attempt),
    *(Job.error_kind, Job.error_message, Job.reused_from, Job.search_id, *MIXTURE_COLUMNS, Attempt.claimed_at),
).outerjoin(Attempt, (Attempt.job_id == Job.id) & (Attempt.attempt == Job.attempt))


class Watcher:
    """Watches these batches, or if there are none all that are open, those too that come later.

    The first look reports the failures that there are and what runs; each later one what has changed since.
    """

    def __init__(
        self,
        batch_ids: Sequence[int],
        *,
        lease_s: float,
        judges: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``judges``: whether anybody wants to know how long it will take."""
        self._given = tuple(batch_ids)
        self._lease_s = lease_s
        self._judges = judges
        self._clock = clock
        self._batch_ids: set[int] = set(batch_ids)
        # The stages of the jobs that ran at the last look.
        self._running: dict[int, str | None] = {}
        self._reported: set[int] = set()
        self._ended = 0
        self._looked_at: datetime | None = None
        self._left = TimeLeft()
        self._judged_at = -_JUDGE_S

    def look(self, session: Session) -> Snapshot:
        if not self._given:
            self._batch_ids.update(open_batches(session))
        now = session.execute(select(db_now())).scalar_one()
        self._judge(session)
        rows = self._rows(session, _JOB.where(Job.state == JobState.RUNNING, Job.batch_id.in_(self._batch_ids)))
        listed = list_batches(session, sorted(self._batch_ids)) if self._batch_ids else []
        queued = [batch_number(row["batch_id"]) for row in listed if row[JobState.QUEUED]]
        lacking = lacking_devices(session, queued, self._lease_s)
        batches = [self._batch(row, lacking) for row in listed]
        news, more = self._news(session, rows, sum(batch.ended for batch in batches))
        self._looked_at = now
        workers = [worker for worker in list_workers(session, self._lease_s) if _is_shown(worker)]
        return Snapshot(
            batches=tuple(batches),
            running=tuple(self._job(row, now) for row in rows),
            news=tuple(self._job(row, now) for row in news),
            more_news=more,
            workers=tuple(map(_worker, workers)),
            live_workers=sum(worker["state"] == WorkerState.READY for worker in workers),
            has_scheduler=holder(session, LEAD) is not None,
            pauses=tuple(pause.message for pause in in_force(session)),
        )

    def _judge(self, session: Session) -> None:
        if self._judges and self._clock() - self._judged_at >= _JUDGE_S:
            self._left = time_left(session, lease_s=self._lease_s)
            self._judged_at = self._clock()

    def _rows(self, session: Session, query: Select[Any]) -> Sequence[Row[Any]]:
        return session.execute(query.order_by(Job.id)).all()

    def _news(self, session: Session, running: Sequence[Row[Any]], ended: int) -> tuple[list[Row[Any]], int]:
        """The jobs of which there is news, and of how many more there is."""
        now = {row.id: row.stage for row in running}
        if self._looked_at is None:
            found = [*self._failed(session), *running]
        else:
            changed = [row for row in running if row.id not in self._running or self._running[row.id] != row.stage]
            gone = self._by_id(session, self._running.keys() - now.keys())
            # A job may have run from its beginning to its end between two looks, or have been answered or cancelled.
            unseen = ended - self._ended - sum(row.state in ENDED_STATES for row in gone)
            found = [*gone, *(self._unseen(session, self._looked_at, gone) if unseen > 0 else ()), *changed]
        self._running, self._ended = now, ended
        self._reported.update(row.id for row in found if row.state in ENDED_STATES)
        return found[:_MOST_NEWS], max(0, len(found) - _MOST_NEWS)

    def _failed(self, session: Session) -> Sequence[Row[Any]]:
        """The last ones."""
        failed = _JOB.where(Job.batch_id.in_(self._batch_ids), Job.state == JobState.FAILED)
        return session.execute(failed.order_by(Job.id.desc()).limit(_MOST_NEWS)).all()[::-1]

    def _by_id(self, session: Session, ids: Collection[int]) -> list[Row[Any]]:
        return [row for some in in_chunks(sorted(ids)) for row in self._rows(session, _JOB.where(Job.id.in_(some)))]

    def _unseen(self, session: Session, since: datetime, seen: Iterable[Row[Any]]) -> list[Row[Any]]:
        """The jobs that have ended since the last look without being seen to run, each once."""
        known = self._reported | {row.id for row in seen}
        ended = _JOB.where(
            Job.batch_id.in_(self._batch_ids),
            Job.state.in_(ENDED_STATES),
            Job.finished_at >= since - _SLACK,
        )
        return [row for row in self._rows(session, ended) if row.id not in known]

    def _job(self, row: Row[Any], now: datetime) -> WatchedJob:
        end = now if row.state == JobState.RUNNING else row.finished_at
        has_time = row.claimed_at is not None and end is not None
        return WatchedJob(
            job_id=format_job_id(row.id),
            model=row.model,
            method=row.method,
            recovery=row.recovery,
            mixture=mixture_origin(row),
            has_found=row.search_id is not None,
            state=JobState(row.state),
            stage=row.stage if row.state == JobState.RUNNING else None,
            progress=JobProgress.from_json(row.progress),
            is_active=row.work_started,
            elapsed_s=max(0.0, (end - row.claimed_at).total_seconds()) if has_time else None,
            left_s=self._remaining(self._left.jobs.get(row.id)),
            error=": ".join(filter(None, (row.error_kind, row.error_message))) or None,
            answered_by=None if row.reused_from is None else format_job_id(row.reused_from),
            was_begun=row.attempt > 0,
        )

    def _batch(self, row: Mapping[str, Any], lacking: Mapping[int, DeviceKind]) -> WatchedBatch:
        batch_id = batch_number(row["batch_id"])
        return WatchedBatch(
            batch_id=format_batch_id(batch_id),
            name=row["name"],
            counts={state: row[state] for state in JobState},
            elapsed_s=row["elapsed_s"],
            left_s=self._remaining(self._left.batches.get(batch_id)),
            lacks_device=lacking.get(batch_id),
        )

    def _remaining(self, judged_s: float | None) -> float | None:
        """What is left now of what was left when it was judged."""
        return None if judged_s is None else max(0.0, judged_s - (self._clock() - self._judged_at))


def _is_shown(worker: dict[str, Any]) -> bool:
    """Workers that were lost long ago stay listed."""
    return worker["state"] != LOST or bool(worker["jobs"])


def _worker(row: dict[str, Any]) -> WatchedWorker:
    return WatchedWorker(
        name=row["worker"],
        host=row["host"],
        device_name=row["device_name"],
        state=row["state"],
        memory_bytes=row["memory_bytes"],
        used_bytes=row["used_bytes"],
        busy_share=row["busy_share"],
        jobs=tuple(row["jobs"]),
    )

"""Whatever happens to jobs, in whatever order: what must hold of their rows holds."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
from sqlalchemy import select, update

from qbatch.core.byte_units import GIB
from qbatch.core.domain import ENDED_STATES, DeviceKind, JobState, Method, Stage
from qbatch.core.errors import ERROR_KINDS, CudaOom, InternalError, WorkerLost, job_error
from qbatch.core.retry_policy import RetryLimits
from qbatch.models_db import jobs, window, workers
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.jobs import Token
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job, Result, Worker
from qbatch.scheduler.dispatch import live_queues
from tests.rows import a_batch, a_gpu, bundle, claim, succeed

MAX_FAILURES = 3
# Of the workers' memory, in GiB.
SIZES = (24.0, 80.0)
# No waiting between attempts: the backoff's own test is elsewhere.
POLICY: dict[str, Any] = {"limits": RetryLimits(backoff_s=0.0, max_failures=MAX_FAILURES)}


@cache
def _migrated() -> bytes:
    """An upgraded database, for each example to copy."""
    with tempfile.TemporaryDirectory(prefix="qb-") as folder:
        file = Path(folder) / "qbatch.db"
        database = Database(f"sqlite:///{file}")
        upgrade(database)
        database.dispose()
        return file.read_bytes()


class Jobs(RuleBasedStateMachine):
    """Two GPU workers of different size, four jobs in two bundles, and everything that may be done to them."""

    tokens: Bundle[Token] = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="qb-")
        file = Path(self._folder.name) / "qbatch.db"
        file.write_bytes(_migrated())
        self.database = Database(f"sqlite:///{file}")
        self.workers = [a_gpu(self.database, gib) for gib in SIZES]
        self.batch_id, self.ids = a_batch(
            self.database,
            bundle("/a", Method.NONE, Method.NF4, device=DeviceKind.CUDA, needs={Method.NONE: 40 * GIB}),
            bundle("/b", Method.NF4, Method.INT8, device=DeviceKind.CUDA, needs={Method.INT8: 90 * GIB}),
        )
        # By job, the largest memory that was too small for it.
        self.too_small: dict[int, float] = {}
        self.attempts = dict.fromkeys(self.ids, 0)
        self.cancelled: set[int] = set()
        self.claimed: set[Token] = set()

    def teardown(self) -> None:
        self.database.dispose()
        self._folder.cleanup()

    def rows(self) -> dict[int, dict[str, Any]]:
        with self.database.read() as session:
            # Not as objects, which take most of this test's time.
            return {row["id"]: dict(row) for row in session.execute(select(Job.__table__)).mappings()}

    def is_current(self, token: Token, *states: JobState) -> bool:
        row = self.rows()[token[0]]
        return row["attempt"] == token[1] and row["state"] in states

    @rule(target=tokens, worker=st.integers(0, 1), picked=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def claim(self, worker: int, picked: list[int]) -> Any:
        before = self.rows()
        taken = claim(self.database, [self.ids[n] for n in picked], self.workers[worker])
        for job_id, attempt in taken:
            assert before[job_id]["state"] == JobState.QUEUED
            assert attempt == before[job_id]["attempt"] + 1
            assert (job_id, attempt) not in self.claimed, "an attempt is given out once"
            assert SIZES[worker] > self.too_small.get(job_id, 0.0), "the claim of a GPU known to be too small"
        self.claimed.update(taken)
        return multiple(*taken)

    @rule(token=tokens)
    def heartbeat(self, token: Token) -> None:
        current = self.is_current(token, JobState.RUNNING)
        before = self.rows()
        with self.database.write() as session:
            assert jobs.heartbeat(session, [token], 60.0) == (frozenset([token[0]]) if current else frozenset())
        if not current:
            assert self.rows() == before

    @rule(token=tokens, stage=st.sampled_from(Stage), started=st.booleans())
    def note(self, token: Token, stage: Stage, started: bool) -> None:
        current = self.is_current(token, JobState.RUNNING)
        before = self.rows()
        with self.database.write() as session:
            jobs.note(session, token, stage=stage, work_started=started, progress={"bytes_read": 1})
        assert (self.rows() != before) <= current

    @rule(token=tokens)
    def succeed(self, token: Token) -> None:
        before = self.rows()
        given_up = before[token[0]]["error_kind"] in (WorkerLost.kind, InternalError.kind) and self.is_current(
            token, JobState.FAILED
        )
        current = given_up or self.is_current(token, JobState.RUNNING, JobState.QUEUED)
        assert succeed(self.database, token) == current
        after = self.rows()
        assert (after[token[0]]["state"] == JobState.SUCCEEDED) if current else (after == before)

    @rule(token=tokens, kind=st.sampled_from(ERROR_KINDS) | st.just(CudaOom.kind))
    def fail(self, token: Token, kind: str) -> None:
        current = self.is_current(token, JobState.RUNNING)
        before = self.rows()
        with self.database.write() as session:
            assert jobs.fail(session, token, job_error(kind, "why"), lease_s=60.0, **POLICY) == current
        after = self.rows()
        assert (after[token[0]]["state"] in (JobState.QUEUED, JobState.FAILED)) if current else (after == before)
        if current and kind == CudaOom.kind:
            assert after[token[0]]["failures"] == before[token[0]]["failures"]
            self.too_small[token[0]] = SIZES[self.workers.index(before[token[0]]["worker_id"])]

    @rule(worker=st.integers(0, 1), state=st.sampled_from(["ready", "stopped"]), ago_s=st.sampled_from([0.0, 1000.0]))
    def a_worker_comes_or_goes(self, worker: int, state: str, ago_s: float) -> None:
        with self.database.write() as session:
            change = update(Worker).where(Worker.id == self.workers[worker])
            session.execute(change.values(state=state, heartbeat_at=db_now(-ago_s), device_errors=0))

    @rule()
    def give_up(self) -> None:
        with self.database.write() as session:
            around = [worker.memory_bytes / GIB for worker, _ in workers.around(session, 60.0)]
            failed = jobs.give_up_too_large(session, 60.0)
        assert all(self.too_small[job_id] >= max(around) for job_id in failed)
        waiting = [job_id for job_id, row in self.rows().items() if row["state"] == JobState.QUEUED]
        assert not around or all(self.too_small.get(job_id, 0.0) < max(around) for job_id in waiting)

    @rule(token=tokens, alone=st.booleans())
    def hand_back(self, token: Token, alone: bool) -> None:
        current = self.is_current(token, JobState.RUNNING)
        before = self.rows()
        with self.database.write() as session:
            jobs.hand_back(session, [token], alone=alone)
        after = self.rows()
        if not current:
            assert after == before
        else:
            assert after[token[0]]["state"] == JobState.QUEUED
            assert after[token[0]]["failures"] == before[token[0]]["failures"]

    @rule(picked=st.sets(st.integers(0, 3)))
    def leases_run_out(self, picked: set[int]) -> None:
        chosen = [self.ids[n] for n in picked]
        running = {job_id for job_id, row in self.rows().items() if row["state"] == JobState.RUNNING}
        with self.database.write() as session:
            silent = update(Job).where(Job.id.in_(chosen), Job.state == JobState.RUNNING)
            session.execute(silent.values(lease_expires_at=db_now(-1.0)))
        with self.database.write() as session:
            assert jobs.expire(session, **POLICY) == sorted(running.intersection(chosen))

    @rule(worker=st.integers(0, 1))
    def a_worker_dies(self, worker: int) -> None:
        with self.database.write() as session:
            jobs.expire(session, **POLICY, worker_id=self.workers[worker])
        held = [row for row in self.rows().values() if row["worker_id"] == self.workers[worker]]
        assert all(row["state"] != JobState.RUNNING for row in held)

    @rule()
    def top_up(self) -> None:
        with self.database.write() as session:
            sent = [
                (job_id, one.needs)
                for one in live_queues(workers.around(session, 60.0))
                for dispatch in window.choose(session, kind=one.kind, queue=one.queue, slots=3, needs=one.needs)
                for job_id in dispatch.job_ids
            ]
        assert len(sent) == len(dict(sent))
        rows = self.rows()
        for job_id, needs in sent:
            assert rows[job_id]["state"] == JobState.QUEUED
            assert self.too_small.get(job_id, 0.0) * GIB < (needs.under or needs.largest or 0)

    @rule()
    def everything_vanishes_from_redis(self) -> None:
        for _ in range(2):
            with self.database.write() as session:
                window.record_scan(session, missing=list(window.waiting_messages(session)), present=[])
        with self.database.read() as session:
            assert window.waiting_messages(session) == {}

    @rule(picked=st.sets(st.integers(0, 3)), whole=st.booleans())
    def cancel(self, picked: set[int], whole: bool) -> None:
        chosen = self.ids if whole else [self.ids[n] for n in picked]
        open_ = [job_id for job_id in sorted(chosen) if self.rows()[job_id]["state"] not in ENDED_STATES]
        with self.database.write() as session:
            target: dict[str, Any] = {"batch_ids": [self.batch_id]} if whole else {"job_ids": chosen}
            assert jobs.cancel(session, **target) == open_
        self.cancelled.update(open_)

    @rule(picked=st.sets(st.integers(0, 3)))
    def retry(self, picked: set[int]) -> None:
        chosen = [self.ids[n] for n in picked]
        over = [n for n in sorted(chosen) if self.rows()[n]["state"] in (JobState.FAILED, JobState.CANCELLED)]
        with self.database.write() as session:
            assert jobs.retry(session, job_ids=chosen) == over
        self.cancelled.difference_update(over)

    @invariant()
    def attempts_never_fall(self) -> None:
        for job_id, row in self.rows().items():
            assert row["attempt"] >= self.attempts[job_id]
            self.attempts[job_id] = row["attempt"]

    @invariant()
    def a_result_belongs_to_a_job_that_succeeded(self) -> None:
        with self.database.read() as session:
            measured = list(session.scalars(select(Result.job_id)))
        rows = self.rows()
        assert set(measured) == {job_id for job_id, row in rows.items() if row["state"] == JobState.SUCCEEDED}
        assert len(measured) == len(set(measured))

    @invariant()
    def failures_have_a_bound(self) -> None:
        for row in self.rows().values():
            assert 0 <= row["failures"] <= MAX_FAILURES
            assert row["failures"] < MAX_FAILURES or row["state"] != JobState.RUNNING

    @invariant()
    def cancelled_stays_cancelled_until_it_is_retried(self) -> None:
        rows = self.rows()
        assert all(rows[job_id]["state"] == JobState.CANCELLED for job_id in self.cancelled)

    @invariant()
    def only_what_runs_has_a_lease_and_only_what_waits_a_message(self) -> None:
        for row in self.rows().values():
            assert (row["lease_expires_at"] is not None) == (row["state"] == JobState.RUNNING)
            assert row["dispatch_id"] is None or row["state"] == JobState.QUEUED
            assert (row["queue"] is None) == (row["dispatch_id"] is None)
            assert (row["finished_at"] is not None) == (row["state"] in ENDED_STATES)
            assert (row["stage"] is not None) <= (row["state"] != JobState.QUEUED)
            assert (row["error_kind"] is not None) or row["state"] != JobState.FAILED

    @invariant()
    def an_attempt_is_open_exactly_while_it_runs(self) -> None:
        with self.database.read() as session:
            rows = session.execute(select(Attempt.job_id, Attempt.attempt).where(Attempt.ended_at.is_(None)))
            open_ = {(job_id, attempt) for job_id, attempt in rows}
        running = {(n, row["attempt"]) for n, row in self.rows().items() if row["state"] == JobState.RUNNING}
        assert open_ == running


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)

"""Fills a database with years of work, by bulk inserts: ended batches, their attempts and results, and a backlog."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Table, func, select, text

from qbatch.core.domain import BASELINE, JobState, Method, ProtocolOptions, Scheme
from qbatch.core.measured.measurement import MEASURED_COLUMNS
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Batch, Checkpoint, Job, Result, Worker

GIB = 2**30
_SCHEMES = (BASELINE, Scheme(method=Method.INT8), Scheme(method=Method.NF4))
_DAYS = 60
_STOPPED_WORKERS = 200
_LIVE_GPUS_GIB = (22.5, 22.5, 79.6, 79.6)
_ERRORS = ("cuda_oom", "internal_error", "fetch_error", "unsupported", "host_oom", "source_gated", "device_error")
_SEEN_EVERY = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """``jobs`` in all; ``large``: models of one large ended batch; ``queued``: jobs of the backlog; ``small``: models
    of each other ended batch. Each model has three jobs."""

    jobs: int
    large: int
    queued: int
    small: int = 100

    @property
    def of_small_batches(self) -> int:
        return max(self.jobs - 3 * self.large - self.queued, 0) // 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """``number`` of the batch, how many models it has, and whether its jobs have ended."""

    number: int
    models: int
    ended: bool


def fill(database: Database, sizes: Sizes) -> None:
    """Fill an empty database. Statistics are gathered on PostgreSQL, where the server would do it by itself."""
    rows = _History(database.is_sqlite)
    plans = _plans(sizes)
    _insert(database, Worker, rows.workers())
    _insert(database, Batch, (rows.batch(plan) for plan in plans))
    _insert(database, Job, rows.jobs(plans))
    _insert(database, Attempt, rows.attempts(plans))
    _insert(database, Result, rows.results(plans))
    _insert(database, Checkpoint, rows.checkpoints(plans))
    if not database.is_sqlite:
        _after_postgresql(database)


def _plans(sizes: Sizes) -> list[_Plan]:
    ended = [sizes.small] * (sizes.of_small_batches // sizes.small) + [sizes.large]
    waiting = [sizes.queued // 6] * 2
    return [
        _Plan(number=number, models=models, ended=number <= len(ended))
        for number, models in enumerate([*ended, *waiting], start=1)
    ]


def large_batch(database: Database) -> int:
    """The id of the ended batch with the most jobs: the last but two."""
    with database.read() as session:
        return int(session.execute(text("SELECT max(id) - 2 FROM batches")).scalar_one())


def first_result(database: Database, batch_id: int) -> int:
    """The id of the first quantized job of the batch that has a result."""
    with database.read() as session:
        found = select(func.min(Result.job_id)).join(Job).where(Job.batch_id == batch_id, Job.method != Method.NONE)
        return int(session.execute(found).scalar_one())


class _History:
    """The rows of each table. A job's fate follows from its number, so that all tables agree."""

    def __init__(self, is_sqlite: bool) -> None:
        self._zone = "" if is_sqlite else "+00"
        self._now = datetime.now(UTC)
        self._protocol = json.dumps(ProtocolOptions(eval_text_sha256="0" * 64).to_json())
        self._schemes = [json.dumps(scheme.to_json()) for scheme in _SCHEMES]
        self._details = json.dumps(_details())

    def _time(self, days_ago: float) -> str:
        return (self._now - timedelta(days=days_ago)).strftime("%Y-%m-%d %H:%M:%S.%f") + self._zone

    def workers(self) -> Iterator[Mapping[str, Any]]:
        for number in range(1, _STOPPED_WORKERS + len(_LIVE_GPUS_GIB) + 1):
            live = number - _STOPPED_WORKERS - 1
            yield {
                "id": number,
                "name": f"worker-{number}",
                "host": f"host-{number % 20}",
                "pid": number,
                "pid_space": f"boot-{number % 20}",
                "device_kind": "cuda",
                "device_name": "NVIDIA H100",
                "device_uuid": f"GPU-{number % 40}",
                "memory_bytes": int(_LIVE_GPUS_GIB[live % 4] * GIB),
                "state": "ready" if live >= 0 else "stopped",
                "device_errors": 0,
                "started_at": self._time(_DAYS),
                "heartbeat_at": self._time(0 if live >= 0 else 1),
            }

    def batch(self, plan: _Plan) -> Mapping[str, Any]:
        return {
            "id": plan.number,
            "name": f"batch {plan.number}",
            "priority": 0,
            "options": "{}",
            "created_at": self._time(1),
        }

    def jobs(self, plans: Iterable[_Plan]) -> Iterator[Mapping[str, Any]]:
        for number, (plan, model, place) in _numbered(plans):
            state, ended = _fate(number, plan), plan.ended
            failed = state == JobState.FAILED
            days_ago = _days_ago(number)
            yield {
                "id": number,
                "batch_id": plan.number,
                "bundle": f"{plan.number}:{model}",
                "model": _model(plan, model),
                "location": f"/models/{_model(plan, model)}",
                "is_folder": True,
                "scheme": self._schemes[place],
                "method": _SCHEMES[place].method.value,
                "bits": (16, 8, 4)[place],
                "dtype": "auto",
                "device": "auto",
                "protocol": self._protocol,
                "force": False,
                "allow_pickle": False,
                "priority": 0,
                "time_limit_s": 86400.0,
                "checkpoint_key": _key(number) if ended or model % 2 else None,
                "state": state.value,
                "attempt": 1 if ended or number % _SEEN_EVERY == 0 else 0,
                "failures": int(failed),
                "forgiven_attempt": 0,
                "work_started": ended,
                "error_kind": _error(number) if failed else None,
                "error_message": "the model could not be loaded: something is missing" if failed else None,
                "reused_from": _reused(number, plan),
                "above_memory_bytes": None if model % 3 == 0 else (30, 14, 6)[place] * GIB,
                "worker_id": number % _STOPPED_WORKERS + 1 if ended else None,
                "missed_scans": 0,
                "created_at": self._time(days_ago + 0.1),
                "started_at": self._time(days_ago) if ended else None,
                "finished_at": self._time(days_ago - 0.01) if ended else None,
            }

    def attempts(self, plans: Iterable[_Plan]) -> Iterator[Mapping[str, Any]]:
        identity = itertools.count(1)
        for number, (plan, _, _) in _numbered(plans):
            state = _fate(number, plan)
            ran_out = state == JobState.QUEUED and number % _SEEN_EVERY == 0
            if not ran_out and (not plan.ended or _reused(number, plan) is not None):
                continue
            outcome = "cuda_oom" if ran_out else _error(number) if state == JobState.FAILED else state.value
            yield {
                "id": next(identity),
                "job_id": number,
                "attempt": 1,
                "worker_id": number % _STOPPED_WORKERS + 1,
                "claimed_at": self._time(_days_ago(number)),
                "ended_at": self._time(_days_ago(number) - 0.01),
                "outcome": outcome,
                "message": None,
            }

    def results(self, plans: Iterable[_Plan]) -> Iterator[Mapping[str, Any]]:
        for number, (plan, _, place) in _numbered(plans):
            if _has_result(number, plan):
                yield self._result(number, place)

    def _result(self, number: int, place: int) -> Mapping[str, Any]:
        spread = number * 7919 % 10007 / 10007
        size = (16, 9, 6)[place] * GIB
        return dict.fromkeys(MEASURED_COLUMNS) | {
            "job_id": number,
            "attempt": 1,
            "checkpoint_path": f"checkpoints/{_key(number)}" if place else None,
            "protocol": self._protocol,
            "protocol_hash": hashlib.sha256(self._protocol.encode()).hexdigest(),
            "device_name": "NVIDIA H100",
            "dtype": "bfloat16",
            "compute_dtype": "bfloat16",
            "num_parameters": 8 * 10**9,
            "quantized_fraction": 0.87 if place else 0.0,
            "bits_per_param": (16.0, 8.6, 4.9)[place],
            "disk_bytes": size + number,
            "memory_footprint_bytes": size + number,
            "weights_bytes": size + number,
            "max_allocated_bytes": size + GIB + number,
            "load_model_s": 2 + spread,
            "quantize_s": 3 + spread if place else None,
            "prefill_s_p50": 0.02 + spread / 100,
            "decode_tokens_per_s": 40 + 20 * spread,
            "per_token_s_p50": 0.02 + spread / 1000,
            "per_token_s_p99": 0.03 + spread / 1000,
            "perplexity": 8 + spread,
            "kl_mean": spread / 10 if place else None,
            "top1_agreement": 0.9 + spread / 20 if place else None,
            "details": self._details,
            "created_at": self._time(_days_ago(number) - 0.01),
        }

    def checkpoints(self, plans: Iterable[_Plan]) -> Iterator[Mapping[str, Any]]:
        for number, (plan, _, place) in _numbered(plans):
            if place and _has_result(number, plan):
                yield {
                    "key": _key(number),
                    "path": f"checkpoints/{_key(number)}",
                    "root_sha256": _key(number),
                    "disk_bytes": 6 * GIB,
                    "job_id": number,
                    "created_at": self._time(_days_ago(number)),
                    "verified_at": self._time(_days_ago(number)),
                }


def _numbered(plans: Iterable[_Plan]) -> Iterator[tuple[int, tuple[_Plan, int, int]]]:
    """Each job's number, from 1, with its batch, its model and its place among the schemes."""
    places = ((plan, model, place) for plan in plans for model in range(plan.models) for place in range(3))
    return enumerate(places, start=1)


def _fate(number: int, plan: _Plan) -> JobState:
    if not plan.ended:
        return JobState.QUEUED
    share = number * 2654435761 % 1000
    if share < 54:
        return JobState.FAILED
    return JobState.CANCELLED if share < 70 else JobState.SUCCEEDED


def _has_result(number: int, plan: _Plan) -> bool:
    return _fate(number, plan) == JobState.SUCCEEDED and _reused(number, plan) is None


def _reused(number: int, plan: _Plan) -> int | None:
    """A twentieth of what succeeded was answered by a job of the first batch."""
    if number % 20 or plan.number == 1 or _fate(number, plan) != JobState.SUCCEEDED:
        return None
    return next(first for first in range(1 + number % 30, 300) if _fate(first, plan) == JobState.SUCCEEDED)


def _error(number: int) -> str:
    return _ERRORS[number % len(_ERRORS)]


def _days_ago(number: int) -> float:
    return 0.02 + number * 31 % 6000 / 6000 * _DAYS


def _model(plan: _Plan, model: int) -> str:
    return f"organization-{model % 50}/a-model-with-a-usual-name-{plan.number}-{model}"


def _key(number: int) -> str:
    return hashlib.sha256(number.to_bytes(8, "big")).hexdigest()


def _details() -> dict[str, Any]:
    """About as long as those of a language model that was measured on a GPU."""
    times = {"count": 630, "mean": 0.0205, "stdev": 0.0004, "p50": 0.0204, "p90": 0.0206, "p95": 0.0207, "p99": 0.0211}
    phases = ("prefill", "decode", "per_token")
    return {
        "task": "causal-lm",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "bitsandbytes": "0.50.2", "cuda": "13.0"},
        "stats": dict.fromkeys(phases, times),
        "rounds": {"phases": {phase: {"p50_by_round": [0.02, 0.021, 0.02], "spread": 0.01} for phase in phases}},
        "quality": {"kl_mean": 0.01, "kl_p99": 0.1, "kl_standard_error": 0.001, "windows": 32, "tokens": 32_736},
        "device_uuid": "GPU-1",
        "fingerprint": "f" * 64,
        "audits": {},
    }


def _insert(database: Database, table: type[Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """By the driver's fastest way: ``executemany`` or COPY."""
    columns = [column.name for column in _table(table).columns]
    values = (tuple(row.get(name) for name in columns) for row in rows)
    names = ", ".join(columns)
    with database.engine.begin() as connection:
        driver: Any = connection.connection.dbapi_connection
        if database.is_sqlite:
            marks = ", ".join("?" * len(columns))
            driver.executemany(f"INSERT INTO {table.__tablename__} ({names}) VALUES ({marks})", values)  # noqa: S608
            return
        with driver.cursor().copy(f"COPY {table.__tablename__} ({names}) FROM STDIN") as copy:
            for row in values:
                copy.write_row(row)


def _table(table: type[Any]) -> Table:
    found: Table = table.__table__
    return found


def _after_postgresql(database: Database) -> None:
    with database.engine.begin() as connection:
        for name in ("batches", "jobs", "attempts", "workers"):
            connection.execute(
                text(f"SELECT setval(pg_get_serial_sequence('{name}', 'id'), (SELECT max(id) FROM {name}))")  # noqa: S608
            )
    with database.engine.connect() as connection:
        outside: Any = connection.connection.dbapi_connection
        outside.autocommit = True
        outside.execute("VACUUM ANALYZE")
        outside.autocommit = False

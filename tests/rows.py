"""Rows for tests: batches, workers and results of made-up models, written through the real functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.byte_units import GIB
from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import JobError
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.retry_policy import RetryLimits
from qbatch.models_db import jobs, workers
from qbatch.models_db.batches import JobRows, NewJob, add_empty_batch, add_jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job

POLICY: dict[str, Any] = {"limits": RetryLimits(backoff_s=0.01, max_failures=3)}
PROTOCOL = ProtocolOptions(eval_text_sha256="0" * 64)


def spec(model: str = "/models/a", method: Method = Method.NF4, device: DeviceKind = DeviceKind.CPU) -> JobSpec:
    scheme = BASELINE if method is Method.NONE else Scheme(method=method)
    source = SourceRef(name=model, location=model, is_folder=True)
    return JobSpec(source=source, scheme=scheme, dtype=DType.BFLOAT16, device=device, protocol=PROTOCOL)


def bundle(
    model: str = "/models/a",
    *methods: Method,
    device: DeviceKind = DeviceKind.CPU,
    needs: Mapping[Method, int] = MappingProxyType({}),
) -> list[NewJob]:
    """The jobs of one model; ``needs`` are the bytes of which each is predicted to need more."""
    return [
        NewJob(
            spec=spec(model, method, device),
            bits=spec(model, method).scheme.bits(DType.BFLOAT16),
            predicted_memory_bytes=needs.get(method),
        )
        for method in methods or (Method.NONE, Method.NF4, Method.INT8)
    ]


def a_worker(
    database: Database,
    name: str = "w1",
    *,
    kind: DeviceKind = DeviceKind.CPU,
    memory_bytes: int = 1,
    uuid: str | None = None,
) -> int:
    with database.write() as session:
        return workers.register(
            session,
            workers.WorkerInfo(
                name=name,
                host="here",
                pid=1,
                pid_space="this boot",
                device_kind=kind,
                device_name=f"a {kind.upper()}",
                device_uuid=uuid,
                memory_bytes=memory_bytes,
            ),
        )


def a_gpu(database: Database, gib: float, name: str = "") -> int:
    return a_worker(database, name or f"gpu-{gib}", kind=DeviceKind.CUDA, memory_bytes=int(gib * GIB))


def add_batch(
    session: Session,
    bundles: Iterable[Sequence[NewJob]],
    *,
    name: str | None = None,
    priority: int = 0,
    time_limit_s: float | None = None,
) -> int:
    """Add a batch of bundles (jobs that share a source) and return its id."""
    batch_id = add_empty_batch(session, name=name, priority=priority)
    add_jobs(session, JobRows(batch_id, priority=priority, time_limit_s=time_limit_s).of(bundles))
    return batch_id


def a_batch(database: Database, *bundles: list[NewJob], priority: int = 0) -> tuple[int, list[int]]:
    with database.write() as session:
        batch_id = add_batch(session, bundles or (bundle(),), priority=priority)
        return batch_id, list(session.scalars(select(Job.id).where(Job.batch_id == batch_id).order_by(Job.id)))


def states(database: Database) -> dict[int, str]:
    with database.read() as session:
        return {job.id: job.state for job in session.scalars(select(Job))}


def a_job(database: Database, job_id: int) -> Job:
    with database.read() as session:
        job = session.get_one(Job, job_id)
        session.expunge(job)
        return job


def measured() -> Measurement:
    return Measurement(
        device_name="a CPU",
        dtype=DType.BFLOAT16,
        compute_dtype=DType.BFLOAT16,
        num_parameters=10,
        quantized_fraction=0.5,
        bits_per_param=8.0,
        disk_bytes=10,
        memory_footprint_bytes=10,
        weights_bytes=10,
        details=Details.from_json({"task": "causal-lm"}),
    )


def claim(database: Database, job_ids: list[int], worker_id: int, lease_s: float = 60.0) -> list[jobs.Token]:
    with database.write() as session:
        return [(c.job_id, c.attempt) for c in jobs.claim(session, job_ids, worker_id, lease_s)]


def succeed(database: Database, token: jobs.Token) -> bool:
    with database.write() as session:
        return jobs.succeed(
            session, token, measured(), protocol=PROTOCOL.for_device(DeviceKind.CPU), checkpoint_path="checkpoints/x"
        )


def fail(database: Database, token: jobs.Token, error: JobError) -> bool:
    with database.write() as session:
        return jobs.fail(session, token, error, lease_s=60.0, **POLICY)

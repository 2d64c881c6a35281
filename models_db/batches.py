"""Store batches as rows, and turn rows back into job specifications."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, DType, JobSpec, JobState, ProtocolOptions, Scheme, SourceRef
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import insert_into
from qbatch.models_db.tables import Batch, EvalText, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to add.

    ``predicted_memory_bytes``: a GPU must have more, where there is a prediction.
    """

    spec: JobSpec
    bits: int
    checkpoint_key: str | None = None
    reused_from: int | None = None
    predicted_memory_bytes: int | None = None


def add_text(session: Session, sha256: str, content: str) -> None:
    """Store a text under its hash, unless it is stored already."""
    session.execute(insert_into(session, EvalText).values(sha256=sha256, content=content).on_conflict_do_nothing())


def text_content(session: Session, sha256: str) -> str:
    """The text with that hash. Raises KeyError if it is not stored."""
    text = session.get(EvalText, sha256)
    if text is None:
        raise KeyError(sha256)
    return text.content


def add_batch(
    session: Session,
    bundles: Iterable[Sequence[NewJob]],
    *,
    name: str | None = None,
    priority: int = 0,
    time_limit_s: float | None = None,
) -> int:
    """Add a batch of bundles (jobs that share a source) and return its id."""
    batch = Batch(name=name, priority=priority)
    session.add(batch)
    session.flush()
    session.add_all(
        _row(job, batch.id, f"{batch.id}:{number}", priority, time_limit_s)
        for number, bundle in enumerate(bundles)
        for job in bundle
    )
    session.flush()
    return batch.id


def _row(new: NewJob, batch_id: int, bundle: str, priority: int, time_limit_s: float | None) -> Job:
    spec, source = new.spec, new.spec.source
    answered = new.reused_from is not None
    return Job(
        batch_id=batch_id,
        bundle=bundle,
        model=source.name,
        location=source.location,
        revision=source.revision,
        is_folder=source.is_folder,
        scheme=spec.scheme.to_json(),
        method=spec.scheme.method,
        bits=new.bits,
        dtype=spec.dtype,
        device=spec.device,
        protocol=spec.protocol.to_json(),
        force=spec.force,
        allow_pickle=spec.allow_pickle,
        priority=priority,
        time_limit_s=time_limit_s,
        checkpoint_key=new.checkpoint_key,
        state=JobState.SUCCEEDED if answered else JobState.QUEUED,
        reused_from=new.reused_from,
        above_memory_bytes=new.predicted_memory_bytes,
        finished_at=db_now() if answered else None,
    )


def spec_of(job: Job) -> JobSpec:
    return JobSpec(
        source=SourceRef(
            name=job.model,
            location=job.location,
            revision=job.revision,
            is_folder=job.is_folder,
        ),
        scheme=Scheme.from_json(job.scheme),
        dtype=DType(job.dtype),
        device=DeviceKind(job.device),
        protocol=ProtocolOptions.from_json(job.protocol),
        force=job.force,
        allow_pickle=job.allow_pickle,
    )


def are_of_one_model(session: Session, job_ids: Sequence[int]) -> bool:
    """Whether the existing ones among these jobs share a batch and a source, as a worker's bundle must."""
    sources = select(Job.batch_id, Job.location, Job.revision, Job.is_folder).where(Job.id.in_(job_ids)).distinct()
    return len(session.execute(sources).all()) <= 1


def batch_exists(session: Session, batch_id: int) -> bool:
    return session.execute(select(Batch.id).where(Batch.id == batch_id)).first() is not None


def job_exists(session: Session, job_id: int) -> bool:
    return session.execute(select(Job.id).where(Job.id == job_id)).first() is not None

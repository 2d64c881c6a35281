"""Store batches as rows, and turn rows back into job specifications."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, insert, select
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, DType, JobSpec, JobState, ProtocolOptions, Scheme, SourceRef
from qbatch.core.search.search_request import SearchRequest
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.last_ids import next_ids
from qbatch.models_db.session import SharedJson, insert_into
from qbatch.models_db.tables import Base, Batch, Checkpoint, EvalText, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to add.

    ``base_key``: that of the checkpoint to which the adapter with ``checkpoint_key`` belongs.
    ``predicted_memory_bytes``: a GPU must have more, where there is a prediction.
    """

    spec: JobSpec
    bits: int
    checkpoint_key: str | None = None
    base_key: str | None = None
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


def add_empty_batch(session: Session, *, name: str | None, priority: int) -> int:
    batch = Batch(name=name, priority=priority)
    if (ids := next_ids(session, Batch, 1)) is not None:
        batch.id = ids[0]
    session.add(batch)
    session.flush()
    return batch.id


def add_jobs(session: Session, rows: Sequence[dict[str, Any]]) -> None:
    """Add the rows that ``JobRows`` has made, in their order."""
    if not rows:
        return
    now = session.execute(select(db_now())).scalar_one()
    for row in rows:
        is_answered = row["reused_from"] is not None
        row["state"] = JobState.SUCCEEDED if is_answered else JobState.QUEUED
        row["finished_at"] = now if is_answered else None
    for row, job_id in zip(rows, next_ids(session, Job, len(rows)) or (), strict=False):
        row["id"] = job_id
    # The plain statement: the ORM would send one for each row, to learn an id that nobody needs.
    session.connection().execute(insert(Base.metadata.tables[Job.__tablename__]), rows)


class JobRows:
    """Makes the rows of a batch's jobs. Its bundles are numbered in the order in which they come."""

    def __init__(self, batch_id: int, *, priority: int, time_limit_s: float | None) -> None:
        self._batch_id = batch_id
        self._priority = priority
        self._time_limit_s = time_limit_s
        self._bundles = 0
        # A batch has few distinct ones, however many jobs it has.
        self._json: dict[Scheme | ProtocolOptions | SearchRequest, SharedJson] = {}

    def of(self, bundles: Iterable[Sequence[NewJob]]) -> list[dict[str, Any]]:
        return [self._row(job, name) for name, bundle in self._named(bundles) for job in bundle]

    def _named(self, bundles: Iterable[Sequence[NewJob]]) -> Iterator[tuple[str, Sequence[NewJob]]]:
        for bundle in bundles:
            yield f"{self._batch_id}:{self._bundles}", bundle
            self._bundles += 1

    def _row(self, new: NewJob, bundle: str) -> dict[str, Any]:
        spec, source = new.spec, new.spec.source
        return {
            "batch_id": self._batch_id,
            "bundle": bundle,
            "model": source.name,
            "location": source.location,
            "revision": source.revision,
            "is_folder": source.is_folder,
            "scheme": self._encoded(spec.scheme),
            "method": spec.scheme.method,
            "recovery": None if spec.scheme.recovery is None else spec.scheme.recovery.slug,
            "bits": new.bits,
            "dtype": spec.dtype,
            "device": spec.device,
            "protocol": self._encoded(spec.protocol),
            "force": spec.force,
            "allow_pickle": spec.allow_pickle,
            "priority": self._priority,
            "time_limit_s": self._time_limit_s,
            "checkpoint_key": new.checkpoint_key,
            "base_key": new.base_key,
            "reused_from": new.reused_from,
            "above_memory_bytes": new.predicted_memory_bytes,
            "search": None if spec.search is None else self._encoded(spec.search),
        }

    def _encoded(self, value: Scheme | ProtocolOptions | SearchRequest) -> SharedJson:
        if value not in self._json:
            self._json[value] = SharedJson(value.to_json())
        return self._json[value]


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
        search=None if job.search is None else SearchRequest.from_json(job.search),
    )


def are_of_one_model(session: Session, job_ids: Sequence[int]) -> bool:
    """Whether the existing ones among these jobs share a batch and a source, as a worker's bundle must."""
    sources = select(Job.batch_id, Job.location, Job.revision, Job.is_folder).where(Job.id.in_(job_ids)).distinct()
    return len(session.execute(sources).all()) <= 1


def jobs_with_checkpoints(session: Session, batch_ids: Sequence[int]) -> list[int]:
    """The jobs of these batches, or of all, whose checkpoints are recorded and not known to be gone."""
    is_there = and_(Checkpoint.key == Job.checkpoint_key, Checkpoint.gone_at.is_(None))
    query = select(Job.id).join(Checkpoint, is_there).order_by(Job.id)
    return list(session.scalars(query.where(Job.batch_id.in_(batch_ids)) if batch_ids else query))


def batch_exists(session: Session, batch_id: int) -> bool:
    return session.execute(select(Batch.id).where(Batch.id == batch_id)).first() is not None


def job_exists(session: Session, job_id: int) -> bool:
    return session.execute(select(Job.id).where(Job.id == job_id)).first() is not None

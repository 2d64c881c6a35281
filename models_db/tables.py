"""The tables. Each has one writer among the modules beside this one; ``retention`` deletes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, MetaData, String, Text, UniqueConstraint, false, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from qbatch.core.domain import JobState, WorkerState
from qbatch.models_db.database_clock import UtcDateTime, db_now


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012


class Batch(Base):
    """One submit."""

    __tablename__ = "batches"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(200))
    priority: Mapped[int] = mapped_column(default=0)
    # Nobody reads it. It stays, since workers of an older version write it, and no row goes without it.
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class EvalText(Base):
    """A text that perplexity is measured on, by its sha256, so that workers need no file of the submitter's."""

    __tablename__ = "texts"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[str] = mapped_column(Text)


class Job(Base):
    """One model × one scheme × one protocol: the unit of state, retry, cancel and result."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"))
    # Jobs of one bundle share it; a job that is sent alone has one of its own.
    bundle: Mapped[str] = mapped_column(String(80), index=True)

    model: Mapped[str] = mapped_column(Text)
    location: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(String(250))
    is_folder: Mapped[bool]
    scheme: Mapped[dict[str, Any]]
    method: Mapped[str] = mapped_column(String(16))
    bits: Mapped[int]
    dtype: Mapped[str] = mapped_column(String(16))
    device: Mapped[str] = mapped_column(String(8))
    protocol: Mapped[dict[str, Any]]
    force: Mapped[bool] = mapped_column(default=False)
    allow_pickle: Mapped[bool] = mapped_column(default=False, server_default=false())
    priority: Mapped[int] = mapped_column(default=0)
    time_limit_s: Mapped[float | None]
    # Settled where the source's fingerprint and the device kind are known: at submit, or by the worker.
    checkpoint_key: Mapped[str | None] = mapped_column(String(64))

    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED.value)
    stage: Mapped[str | None] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    # What the attempts up to this one ended in counts no more: a user wished for a clean slate.
    forgiven_attempt: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    work_started: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any] | None]
    error_kind: Mapped[str | None] = mapped_column(String(32))
    error_message: Mapped[str | None] = mapped_column(Text)
    reused_from: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    # A GPU must have more: predicted, or that of the largest GPU that was too small. ``memory_need`` tells which.
    above_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)

    worker_id: Mapped[int | None] = mapped_column(ForeignKey("workers.id"))
    avoid_worker_id: Mapped[int | None] = mapped_column(ForeignKey("workers.id"))
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]

    # The hint in Redis: which message carries this job, on which queue, and how many scans missed it.
    dispatch_id: Mapped[str | None] = mapped_column(String(36), index=True)
    queue: Mapped[str | None] = mapped_column(String(64))
    missed_scans: Mapped[int] = mapped_column(default=0)

    created_at: Mapped[datetime] = mapped_column(default=db_now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        Index(None, "state", "dispatch_id"),
        Index(None, "state", "lease_expires_at"),
        Index(None, "batch_id", "state"),
        # Who else writes a checkpoint is asked of every job that waits for it.
        Index(None, "checkpoint_key", "state"),
        Index(None, "checkpoint_key", "dispatch_id"),
    )


class Attempt(Base):
    """One claim of one job, kept for the record."""

    __tablename__ = "attempts"

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"))
    claimed_at: Mapped[datetime] = mapped_column(default=db_now())
    ended_at: Mapped[datetime | None]
    # succeeded, handed_back, expired, cancelled, or an error kind
    outcome: Mapped[str | None] = mapped_column(String(32))
    message: Mapped[str | None] = mapped_column(Text)
    # Whether storage failed it in the middle of its own work; null where that was not noted.
    cut_short: Mapped[bool | None]

    __table_args__ = (UniqueConstraint("job_id", "attempt"),)


class Checkpoint(Base):
    """A published directory of shared storage, by its key. ``path`` is relative to the storage."""

    __tablename__ = "checkpoints"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    path: Mapped[str] = mapped_column(Text)
    root_sha256: Mapped[str] = mapped_column(String(64))
    disk_bytes: Mapped[int] = mapped_column(BigInteger)
    # Whose attempt wrote it; nobody's once that job is pruned.
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    # File name → the state (``FileStat.version``) in which its content was last verified, and when that was.
    file_versions: Mapped[dict[str, Any] | None]
    verified_at: Mapped[datetime | None]


class FileDigestRow(Base):
    """What a file's content hashed to, in the state that ``version`` names; ``place`` is its host, mount and path."""

    __tablename__ = "file_digests"

    place: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    path: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(String(150))
    chunk_sha256: Mapped[list[str]]
    sha256: Mapped[str | None] = mapped_column(String(64))
    hashed_at: Mapped[datetime] = mapped_column(default=db_now())


class Result(Base):
    """What one job measured. A job answered from an earlier one has no row of its own."""

    __tablename__ = "results"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int]
    checkpoint_path: Mapped[str | None] = mapped_column(Text)
    protocol: Mapped[dict[str, Any]]
    protocol_hash: Mapped[str] = mapped_column(String(64), index=True)

    device_name: Mapped[str] = mapped_column(String(200))
    dtype: Mapped[str] = mapped_column(String(16))
    compute_dtype: Mapped[str] = mapped_column(String(16))
    num_parameters: Mapped[int] = mapped_column(BigInteger)
    quantized_fraction: Mapped[float]
    bits_per_param: Mapped[float]
    disk_bytes: Mapped[int] = mapped_column(BigInteger)
    memory_footprint_bytes: Mapped[int] = mapped_column(BigInteger)
    weights_bytes: Mapped[int] = mapped_column(BigInteger)
    max_allocated_bytes: Mapped[int | None] = mapped_column(BigInteger)
    load_model_s: Mapped[float | None]
    quantize_s: Mapped[float | None]
    prefill_s_p50: Mapped[float | None]
    decode_tokens_per_s: Mapped[float | None]
    per_token_s_p50: Mapped[float | None]
    per_token_s_p99: Mapped[float | None]
    forward_s_p50: Mapped[float | None]
    forward_samples_per_s: Mapped[float | None]
    perplexity: Mapped[float | None]
    kl_mean: Mapped[float | None]
    top1_agreement: Mapped[float | None]
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class Worker(Base):
    """One Celery worker and the device that it owns."""

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    host: Mapped[str] = mapped_column(String(200))
    pid: Mapped[int]
    # The boot and pid namespace in which ``pid`` means something.
    pid_space: Mapped[str] = mapped_column(String(100))
    device_kind: Mapped[str] = mapped_column(String(8))
    device_name: Mapped[str] = mapped_column(String(200))
    device_uuid: Mapped[str | None] = mapped_column(String(64))
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(16), default=WorkerState.READY.value)
    note: Mapped[str | None] = mapped_column(Text)
    device_errors: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime] = mapped_column(default=db_now())
    heartbeat_at: Mapped[datetime] = mapped_column(default=db_now())


class Lease(Base):
    """An exclusive right to something by name: a GPU's UUID, or to lead the schedulers."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    expires_at: Mapped[datetime]


class Pause(Base):
    """Why nothing is dispatched until then; one row a reason."""

    __tablename__ = "pauses"

    reason: Mapped[str] = mapped_column(String(100), primary_key=True)
    message: Mapped[str] = mapped_column(Text)
    needed_bytes: Mapped[int | None] = mapped_column(BigInteger)
    since: Mapped[datetime] = mapped_column(default=db_now())
    until: Mapped[datetime]


class SchemaVersion(Base):
    """A migration that has run, and the oldest schema whose code works with what it left. Written by the migrations."""

    __tablename__ = "schema_versions"

    version: Mapped[str] = mapped_column(String(32), primary_key=True)
    oldest_code: Mapped[str] = mapped_column(String(32))


class DatabaseIdentity(Base):
    """One row: what tells this database from another one in its place. Written by the migration that made it."""

    __tablename__ = "identity"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)

"""The tables. Each is written by one module of this package only; ``retention`` deletes rows of several."""

# Annotations are evaluated at once here: to do so from text takes SQLAlchemy longer, in every command.

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


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    """An index over few of the rows. ``few_jobs`` has the conditions with which a query may use it."""
    return Index(name, *columns, info={"where": where}, unique=unique)


class Batch(Base):
    """One submit."""

    __tablename__ = "batches"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(200))
    priority: Mapped[int] = mapped_column(default=0)
    # Nobody reads it. It stays, since workers of an older version write it, and no row goes without it.
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class LastId(Base):
    """The highest id that a batch or a job ever had, on SQLite. See ``last_ids``."""

    __tablename__ = "last_ids"

    table_name: Mapped[str] = mapped_column(String(32), primary_key=True)
    id: Mapped[int]


class Arrival(Base):
    """A batch that is still being stored: no query sees it or its jobs. See ``arrivals``."""

    __tablename__ = "arrivals"

    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    # When its submit was last heard of.
    seen_at: Mapped[datetime] = mapped_column(default=db_now())
    # Its submit was silent for too long: its jobs are being removed.
    abandoned: Mapped[bool] = mapped_column(default=False)


class EvalText(Base):
    """A text for measuring perplexity, or a packed task, by its sha256. Workers need no files of the submitter."""

    __tablename__ = "texts"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[str] = mapped_column(Text)


class Job(Base):
    """One model × one scheme × one protocol: the unit of state, retry, cancel and result."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"))
    # The same for all jobs of a bundle. A job that is sent alone has a bundle of its own.
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
    # Set when the source's fingerprint and the device kind are known: by submit or by the worker.
    # For a search: the key of what it finds, until a checkpoint has met its bound.
    checkpoint_key: Mapped[str | None] = mapped_column(String(64))
    # If that is the key of an adapter: the key of the checkpoint that it belongs to.
    base_key: Mapped[str | None] = mapped_column(String(64))
    # Which adapter that is, for lists, which do not read whole schemes.
    recovery: Mapped[str | None] = mapped_column(String(32))
    # For a search: ``SearchRequest.to_json``, and what it found. With the latter, a queued job waits for the jobs that
    # publish it.
    search: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    search_id: Mapped[int | None]
    # For a job that publishes a mixture: the search that it is for, and the point of its frontier. Neither is a foreign
    # key, because SQLite adds none to a table that is there; ``retention`` keeps them true.
    search_job_id: Mapped[int | None]
    point: Mapped[int | None]

    state: Mapped[str] = mapped_column(String(16), default=JobState.QUEUED.value)
    stage: Mapped[str | None] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    # The outcomes of attempts up to this one no longer count, because a user has retried the job.
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

    # The message in Redis: its id, its queue, and how many scans in a row did not find it.
    dispatch_id: Mapped[str | None] = mapped_column(String(36))
    queue: Mapped[str | None] = mapped_column(String(64))
    missed_scans: Mapped[int] = mapped_column(default=0)

    created_at: Mapped[datetime] = mapped_column(default=db_now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    # What a migration says of an index in a database's own terms is noted in ``info``: with the options that SQLAlchemy
    # has for it, every command would import that database's dialect.
    __table_args__ = (
        # A page of jobs in the order of submission, and the counts of batches.
        Index(None, "state", "id"),
        Index(None, "batch_id", "state", "id"),
        Index(None, "checkpoint_key", "state"),
        # All jobs of a model. A path may be longer than PostgreSQL's other indexes take.
        Index(None, "location", info={"using": "hash"}),
        _partial_index("ix_jobs_dispatched", "dispatch_id", where="dispatch_id IS NOT NULL"),
        # What the dispatcher walks; it sees by the last two columns which jobs belong in another queue.
        _partial_index(
            "ix_jobs_waiting",
            *("priority", "batch_id", "id", "device", "above_memory_bytes"),
            where="state = 'queued' AND search_id IS NULL AND dispatch_id IS NULL",
        ),
        # Queued again: only these can have run out of memory, or wait for a backoff or for disk space.
        _partial_index(
            "ix_jobs_waiting_again", "attempt", "above_memory_bytes", where="state = 'queued' AND attempt > 0"
        ),
        # The baselines of a model in a batch. PostgreSQL's has the beginning of the path.
        _partial_index("ix_jobs_baselines", "batch_id", "location", where="method = 'none'"),
        _partial_index("ix_jobs_base_key", "base_key", "state", where="base_key IS NOT NULL"),
        _partial_index("ix_jobs_failed", "finished_at", "error_kind", where="state = 'failed'"),
        _partial_index("ix_jobs_search_id", "search_id", where="search_id IS NOT NULL"),
        _partial_index("ix_jobs_points", "search_job_id", "point", where="search_job_id IS NOT NULL", unique=True),
    )


class Attempt(Base):
    """One claim of one job."""

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
    # Whether the storage failed during the job's own work; null if that is unknown.
    cut_short: Mapped[bool | None]

    __table_args__ = (UniqueConstraint("job_id", "attempt"),)


class Checkpoint(Base):
    """A published checkpoint, by its key. ``path`` is relative to the storage."""

    __tablename__ = "checkpoints"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    path: Mapped[str] = mapped_column(Text, index=True)
    root_sha256: Mapped[str] = mapped_column(String(64))
    disk_bytes: Mapped[int] = mapped_column(BigInteger)
    # The job that wrote it; null after that job was pruned.
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=db_now())
    # File name → the state (``FileStat.version``) in which its content was last verified, and when that was.
    file_versions: Mapped[dict[str, Any] | None]
    verified_at: Mapped[datetime | None]
    # Since when it is known that its folder is no longer on the storage: somebody or qbatch removed it.
    gone_at: Mapped[datetime | None]

    __table_args__ = (_partial_index("ix_checkpoints_gone", "key", where="gone_at IS NOT NULL"),)


class FileDigestRow(Base):
    """The checksums of a file in the state ``version``. ``place`` is a hash of its host, mount and path."""

    __tablename__ = "file_digests"

    place: Mapped[str] = mapped_column(String(64), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    path: Mapped[str] = mapped_column(Text)
    version: Mapped[str] = mapped_column(String(150))
    chunk_sha256: Mapped[list[str]]
    sha256: Mapped[str | None] = mapped_column(String(64))
    hashed_at: Mapped[datetime] = mapped_column(default=db_now())


class SkipListKey(Base):
    """The key of a checkpoint under the key that its skip list has as it is spelt."""

    __tablename__ = "skip_list_keys"

    spelled: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(64))
    settled_at: Mapped[datetime] = mapped_column(default=db_now())


class Result(Base):
    """The measurement of one job. A job that is answered by an earlier result has no row here."""

    __tablename__ = "results"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int]
    checkpoint_path: Mapped[str | None] = mapped_column(Text)
    protocol: Mapped[dict[str, Any]]
    protocol_hash: Mapped[str] = mapped_column(String(64), index=True)

    # Each figure has an index, because ``results`` sorts by any of them, whatever the number of rows is.
    device_name: Mapped[str] = mapped_column(String(200))
    dtype: Mapped[str] = mapped_column(String(16))
    compute_dtype: Mapped[str] = mapped_column(String(16))
    num_parameters: Mapped[int] = mapped_column(BigInteger, index=True)
    quantized_fraction: Mapped[float] = mapped_column(index=True)
    bits_per_param: Mapped[float] = mapped_column(index=True)
    disk_bytes: Mapped[int] = mapped_column(BigInteger, index=True)
    memory_footprint_bytes: Mapped[int] = mapped_column(BigInteger, index=True)
    weights_bytes: Mapped[int] = mapped_column(BigInteger, index=True)
    max_allocated_bytes: Mapped[int | None] = mapped_column(BigInteger, index=True)
    load_model_s: Mapped[float | None] = mapped_column(index=True)
    quantize_s: Mapped[float | None] = mapped_column(index=True)
    prefill_s_p50: Mapped[float | None] = mapped_column(index=True)
    decode_tokens_per_s: Mapped[float | None] = mapped_column(index=True)
    per_token_s_p50: Mapped[float | None] = mapped_column(index=True)
    per_token_s_p99: Mapped[float | None] = mapped_column(index=True)
    forward_s_p50: Mapped[float | None] = mapped_column(index=True)
    forward_samples_per_s: Mapped[float | None] = mapped_column(index=True)
    perplexity: Mapped[float | None] = mapped_column(index=True)
    kl_mean: Mapped[float | None] = mapped_column(index=True)
    top1_agreement: Mapped[float | None] = mapped_column(index=True)
    details: Mapped[dict[str, Any]]
    # By which jobs of the same batch find a speed that is theirs too; null if it is not (``Details.speed_key``).
    speed_key: Mapped[str | None] = mapped_column(String(64), index=True)
    created_at: Mapped[datetime] = mapped_column(default=db_now(), index=True)


class AnswersRow(Base):
    """The answers to the questions of one task, or group of tasks, apart from the result since they may be many."""

    __tablename__ = "answers"

    # An older version deletes results without a thought of their answers.
    job_id: Mapped[int] = mapped_column(ForeignKey("results.job_id", ondelete="CASCADE"), primary_key=True)
    task: Mapped[str] = mapped_column(Text, primary_key=True)
    # ``TaskAnswers.to_json``.
    answers: Mapped[dict[str, Any]]


class SearchRow(Base):
    """What a search found (``FinishedSearch``). Of several with one key, the newest answers."""

    __tablename__ = "searches"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), index=True)
    # The job that measured it; null after that job was pruned.
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    sensitivity: Mapped[dict[str, Any]]
    frontier: Mapped[dict[str, Any]]
    parameters: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    device_name: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=db_now())


class Worker(Base):
    """One Celery worker and its device."""

    __tablename__ = "workers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    host: Mapped[str] = mapped_column(String(200))
    pid: Mapped[int]
    # The boot and pid namespace in which ``pid`` is valid.
    pid_space: Mapped[str] = mapped_column(String(100))
    device_kind: Mapped[str] = mapped_column(String(8))
    device_name: Mapped[str] = mapped_column(String(200))
    device_uuid: Mapped[str | None] = mapped_column(String(64))
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    # At the last heartbeat: memory in use, by whatever process, and the share of time in which the device worked.
    used_bytes: Mapped[int | None] = mapped_column(BigInteger)
    busy_share: Mapped[float | None]
    state: Mapped[str] = mapped_column(String(16), default=WorkerState.READY.value)
    note: Mapped[str | None] = mapped_column(Text)
    device_errors: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime] = mapped_column(default=db_now())
    heartbeat_at: Mapped[datetime] = mapped_column(default=db_now())


class Lease(Base):
    """A named lock that expires: for a GPU by its UUID, or for the leading scheduler."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    expires_at: Mapped[datetime]


class Pause(Base):
    """A reason why nothing is dispatched until ``until``; one row per reason."""

    __tablename__ = "pauses"

    reason: Mapped[str] = mapped_column(String(100), primary_key=True)
    message: Mapped[str] = mapped_column(Text)
    needed_bytes: Mapped[int | None] = mapped_column(BigInteger)
    since: Mapped[datetime] = mapped_column(default=db_now())
    until: Mapped[datetime]


class SchemaVersion(Base):
    """A migration that has run, and the oldest schema whose code works with its result. Written by the migrations."""

    __tablename__ = "schema_versions"

    version: Mapped[str] = mapped_column(String(32), primary_key=True)
    oldest_code: Mapped[str] = mapped_column(String(32))


class DatabaseIdentity(Base):
    """One row with a UUID that tells this database from others at its URL. Written by a migration."""

    __tablename__ = "identity"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)

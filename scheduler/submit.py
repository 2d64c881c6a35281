"""One submit: rows first, messages second."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.orm import Session

from models_db import results, workers
from models_db.batches import NewJob, add_batch, add_text
from models_db.domain import DeviceKind, DType, JobSpec, ProtocolOptions, Scheme, SourceRef
from models_db.errors import JobError, UsageError
from models_db.identity import settle
from models_db.session import Database
from models_db.settings import Settings
from models_db.sources import folder_fingerprint, read_config, read_headers, source_dtype
from models_db.storage import is_in_place
from scheduler.grid import Grid
from scheduler.plan import predicted_need
from scheduler.task_files import TaskFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a user submits, understood."""

    sources: tuple[SourceRef, ...]
    grid: Grid
    eval_text: str
    tasks: TaskFiles = field(default_factory=TaskFiles)
    num_fewshot: int | None = None
    task_limit: int | None = None
    name: str | None = None
    priority: int = 0
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if not self.eval_text.strip():
            raise UsageError("the evaluation text is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of it. ``answered`` jobs need no work; ``live_workers`` may do the others now."""

    batch_id: int
    jobs: int
    answered: int
    live_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a local source's headers tell before a worker sees it."""

    fingerprint: str
    dtype: DType
    needs: Mapping[Scheme, int | None]


def submit(database: Database, settings: Settings, submission: Submission) -> Receipt:
    """Store a batch. Nothing is half stored: it is one transaction.

    Raises DatabaseUnreachable. Redis is not needed: the scheduler sends what is stored (see ``send_now``).
    """
    text_hash = hashlib.sha256(submission.eval_text.encode()).hexdigest()
    protocol = ProtocolOptions(
        eval_text_sha256=text_hash,
        tasks=submission.tasks.refs,
        num_fewshot=submission.num_fewshot,
        task_limit=submission.task_limit,
    )
    known = {source.location: _look(source, submission.grid.bundle(source, protocol)) for source in submission.sources}
    with database.write() as session:
        add_text(session, text_hash, submission.eval_text)
        for sha256, content in submission.tasks.texts.items():
            add_text(session, sha256, content)
        live = workers.live(session, settings.lease_s)
        devices = [(DeviceKind(worker.device_kind), worker.device_name) for worker in live]
        bundles = [
            [
                _new_job(session, settings, spec, known[source.location], devices)
                for spec in submission.grid.bundle(source, protocol)
            ]
            for source in submission.sources
        ]
        batch_id = add_batch(
            session,
            bundles,
            name=submission.name,
            priority=submission.priority,
            time_limit_s=submission.time_limit_s,
        )
    new_jobs = [job for bundle in bundles for job in bundle]
    return Receipt(
        batch_id=batch_id,
        jobs=len(new_jobs),
        answered=sum(job.reused_from is not None for job in new_jobs),
        live_workers=len(live),
    )


def _look(source: SourceRef, specs: Sequence[JobSpec]) -> _Known | None:
    """None for a hub id, and for a folder that does not read: its job will say why when it runs."""
    if not source.is_folder:
        return None
    folder = Path(source.location)
    try:
        headers, config = read_headers(folder), read_config(folder)
        return _Known(
            fingerprint=folder_fingerprint(folder),
            dtype=source_dtype(headers),
            needs={spec.scheme: predicted_need(spec, headers, config) for spec in specs},
        )
    except (JobError, OSError):
        return None


def _new_job(
    session: Session,
    settings: Settings,
    spec: JobSpec,
    known: _Known | None,
    devices: Sequence[tuple[DeviceKind, str]],
) -> NewJob:
    bits = spec.scheme.bits(spec.dtype)
    kind = _device_kind(spec.device, devices)
    need = known.needs[spec.scheme] if known is not None else None
    if known is None or kind is None:
        return NewJob(spec=spec, bits=bits, above_memory_bytes=need)
    settled = settle(spec, fingerprint=known.fingerprint, source=known.dtype, device_kind=kind)
    names = {name for device, name in devices if device is kind}
    finished = None
    if not spec.force:
        finished = results.find_finished(
            session,
            checkpoint_key=settled.key,
            protocol_hash=settled.protocol.hash,
            # With nobody there to measure on, any device of the kind answers.
            device_names=names or None,
        )
    if finished is not None and not _is_there(settings, finished.checkpoint_path):
        finished = None
    return NewJob(
        spec=spec,
        bits=bits,
        checkpoint_key=settled.key,
        reused_from=finished.job_id if finished is not None else None,
        above_memory_bytes=need,
    )


def _device_kind(asked: DeviceKind, devices: Sequence[tuple[DeviceKind, str]]) -> DeviceKind | None:
    """Where the job will land; None while nobody can tell."""
    if asked is not DeviceKind.AUTO:
        return asked
    kinds = {kind for kind, _ in devices}
    return next((kind for kind in (DeviceKind.CUDA, DeviceKind.CPU) if kind in kinds), None)


def _is_there(settings: Settings, checkpoint_path: str | None) -> bool:
    """As far as this machine can see: it may not have the storage mounted."""
    return not settings.storage.is_dir() or is_in_place(settings.storage, checkpoint_path)


def send_now(database: Database, settings: Settings) -> None:
    """Send what the window has room for. Raises BrokerUnreachable: the scheduler will send it then."""
    from scheduler.broker import Broker
    from scheduler.dispatch import top_up

    broker = Broker(settings)
    try:
        broker.ping()
        top_up(database, broker, settings)
    finally:
        broker.close()

"""Submit a batch: store its jobs first, send messages second."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, DType, JobSpec, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import JobError, UsageError
from qbatch.core.file_stat import FileStat, Mounts, stat_file
from qbatch.core.identity import Settled, settle, source_fingerprint
from qbatch.core.legacy_identity import legacy_folder_fingerprint
from qbatch.core.methods.registry import missing_library
from qbatch.core.model_files import content_files, names_code
from qbatch.core.settings import Settings
from qbatch.core.sources import read_config, read_headers, source_dtype
from qbatch.core.storage import CheckpointState, checkpoint_state
from qbatch.models_db import file_digests, results, workers
from qbatch.models_db.batches import NewJob, add_batch, add_text
from qbatch.models_db.results import Finished
from qbatch.models_db.session import Database
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.lm_eval_files import TaskFiles
from qbatch.scheduler.vram_prediction import predicted_need


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A validated request to submit a batch."""

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
    """The outcome of ``submit``.

    ``answered`` jobs already have a result; ``live_workers`` can work on the others now. ``outdated`` counts those
    others that have a result of version 0.1.0, which identified a folder only by the sizes and times of its files.
    """

    batch_id: int
    jobs: int
    answered: int
    live_workers: int
    outdated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """What is known about a folder from its headers and config.

    ``stats`` maps each file name to its state; None for a model with its own code, whose identity depends on whether a
    worker runs that code. ``legacy_fingerprint`` is its identity in version 0.1.0.
    """

    dtype: DType
    needs: Mapping[Scheme, int | None]
    stats: Mapping[str, FileStat] | None
    legacy_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _RequestedJob:
    """A job to store.

    ``settled`` is None unless the source's content and the kind of device are known. ``legacy`` is the same with the
    identity that version 0.1.0 would have used.
    """

    spec: JobSpec
    need: int | None
    settled: Settled | None
    legacy: Settled | None

    @property
    def pair(self) -> tuple[str, str] | None:
        return None if self.settled is None or self.spec.force else _pair(self.settled)

    @property
    def legacy_pair(self) -> tuple[str, str] | None:
        return None if self.legacy is None or self.spec.force else _pair(self.legacy)


def _pair(settled: Settled) -> tuple[str, str]:
    """The (checkpoint key, protocol hash) by which a result is found."""
    return settled.key, settled.protocol.hash


def submit(database: Database, settings: Settings, submission: Submission) -> Receipt:
    """Store a batch in one transaction.

    Only headers and configs are read: a folder's content is known if a worker of this host has hashed its files in
    their current state. Redis is not needed: the scheduler sends what is stored (see ``send_now``).

    Raises DatabaseUnreachable, and UsageError for a method that this host or the live workers lack.
    """
    _refuse_missing_libraries(submission.grid)
    text_hash = hashlib.sha256(submission.eval_text.encode()).hexdigest()
    protocol = ProtocolOptions(
        eval_text_sha256=text_hash,
        tasks=submission.tasks.refs,
        num_fewshot=submission.num_fewshot,
        task_limit=submission.task_limit,
    )
    specs = [submission.grid.bundle(source, protocol) for source in submission.sources]
    mounts = Mounts()
    folders = [_inspect(source, bundle, mounts) for source, bundle in zip(submission.sources, specs, strict=True)]
    with database.read() as session:
        live = workers.live(session, settings.lease_s)
        devices = [(DeviceKind(worker.device_kind), worker.device_name) for worker in live]
        _refuse_device(submission.grid, devices)
        bundles = [
            [_settle(spec, folder, fingerprint, devices) for spec in bundle]
            for bundle, folder, fingerprint in zip(specs, folders, _fingerprints(session, folders), strict=True)
        ]
        flat = [one for bundle in bundles for one in bundle]
        finished = _find_finished(session, flat, devices)
        old = _find_old(session, flat)
    answers = _answers(settings, finished)
    # A write transaction blocks all other writers on SQLite, so everything was looked up before it begins.
    with database.write() as session:
        add_text(session, text_hash, submission.eval_text)
        for sha256, content in submission.tasks.texts.items():
            add_text(session, sha256, content)
        still_there = results.keep(session, set(answers.values()))
        batch_id = add_batch(
            session,
            [[_new_job(one, answers, still_there) for one in bundle] for bundle in bundles],
            name=submission.name,
            priority=submission.priority,
            time_limit_s=submission.time_limit_s,
        )
    return Receipt(
        batch_id=batch_id,
        jobs=len(flat),
        answered=sum(_answer(one, answers, still_there) is not None for one in flat),
        live_workers=len(live),
        outdated=sum(one.legacy_pair in old and one.pair not in answers for one in flat),
    )


def _refuse_missing_libraries(grid: Grid) -> None:
    """Raises UsageError, with the line that installs what is missing: without it no job of that method has a key."""
    for scheme in grid.schemes():
        if (missing := missing_library(scheme.description)) is not None:
            raise UsageError(missing)


def _refuse_device(grid: Grid, devices: Sequence[tuple[DeviceKind, str]]) -> None:
    """Raises UsageError where the jobs would land on a device that a method does not work on."""
    kind = _device_kind(grid.device, devices)
    for scheme in grid.schemes():
        if kind is not None:
            scheme.description.refuse_device(kind)


def _inspect(source: SourceRef, specs: Sequence[JobSpec], mounts: Mounts) -> _Folder | None:
    """None for a hub id, and for a folder that cannot be read: its job will fail with the reason."""
    if not source.is_folder:
        return None
    folder = Path(source.location)
    try:
        headers, config = read_headers(folder), read_config(folder)
        return _Folder(
            dtype=source_dtype(headers),
            needs={spec.scheme: predicted_need(spec, headers, config) for spec in specs},
            # Each worker decides whether the model's own code may run, which makes it a different model.
            stats=None if names_code(folder) else _stats(folder, mounts),
            legacy_fingerprint=legacy_folder_fingerprint(folder),
        )
    except (JobError, OSError):
        return None


def _stats(folder: Path, mounts: Mounts) -> dict[str, FileStat]:
    return {name: stat_file(path, mounts) for name, path in content_files(folder).items()}


def _fingerprints(session: Session, folders: Sequence[_Folder | None]) -> list[str | None]:
    """The identity of each source; None unless all its files were hashed in their current state."""
    stats = [folder.stats if folder is not None else None for folder in folders]
    known = file_digests.known(session, {stat for files in stats if files is not None for stat in files.values()})
    return [source_fingerprint(files, known) if files is not None else None for files in stats]


def _settle(
    spec: JobSpec, folder: _Folder | None, fingerprint: str | None, devices: Sequence[tuple[DeviceKind, str]]
) -> _RequestedJob:
    if folder is None:
        return _RequestedJob(spec=spec, need=None, settled=None, legacy=None)
    kind = _device_kind(spec.device, devices)

    def settled(name: str | None) -> Settled | None:
        if name is None or kind is None:
            return None
        return settle(spec, fingerprint=name, source=folder.dtype, device_kind=kind)

    return _RequestedJob(
        spec=spec,
        need=folder.needs[spec.scheme],
        settled=settled(fingerprint),
        legacy=settled(folder.legacy_fingerprint),
    )


def _find_finished(
    session: Session, requested: Sequence[_RequestedJob], devices: Sequence[tuple[DeviceKind, str]]
) -> dict[tuple[str, str], Finished]:
    """Earlier results by (key, protocol hash), measured on a device with the name of one that is live now."""
    finished: dict[tuple[str, str], Finished] = {}
    for kind in (DeviceKind.CUDA, DeviceKind.CPU):
        jobs = (one for one in requested if _device_kind(one.spec.device, devices) is kind)
        # If no worker of this kind is live, results of any device of the kind are accepted.
        names = {name for device, name in devices if device is kind} or None
        finished |= results.find_finished(session, {one.pair for one in jobs if one.pair}, device_names=names)
    return finished


def _answers(settings: Settings, finished: Mapping[tuple[str, str], Finished]) -> dict[tuple[str, str], int]:
    """The ids of earlier jobs whose results can be reused, because their checkpoints are as they were verified.

    A checkpoint whose files must be read to know is left to a worker.
    """
    # If this machine has not mounted the storage, the checkpoints cannot be checked here.
    sees_storage = settings.storage.is_dir()
    return {
        pair: one.job_id
        for pair, one in finished.items()
        if one.checkpoint_path is None
        or not sees_storage
        or checkpoint_state(settings.storage, one.checkpoint_path, one.versions) is CheckpointState.SOUND
    }


def _new_job(job: _RequestedJob, answers: Mapping[tuple[str, str], int], still_there: Collection[int]) -> NewJob:
    return NewJob(
        spec=job.spec,
        bits=job.spec.scheme.bits(job.spec.dtype),
        checkpoint_key=job.settled.key if job.settled is not None else None,
        reused_from=_answer(job, answers, still_there),
        predicted_memory_bytes=job.need,
    )


def _answer(job: _RequestedJob, answers: Mapping[tuple[str, str], int], still_there: Collection[int]) -> int | None:
    job_id = answers.get(job.pair) if job.pair is not None else None
    return job_id if job_id in still_there else None


def _find_old(session: Session, requested: Sequence[_RequestedJob]) -> set[tuple[str, str]]:
    """The (key, protocol hash) pairs that 0.1.0 has measured, perhaps for a different model."""
    pairs = {one.legacy_pair for one in requested if one.legacy_pair}
    return set(results.find_finished(session, pairs, device_names=None))


def _device_kind(requested: DeviceKind, devices: Sequence[tuple[DeviceKind, str]]) -> DeviceKind | None:
    """The kind of device on which the job will run; None if that cannot be known yet."""
    if requested is not DeviceKind.AUTO:
        return requested
    kinds = {kind for kind, _ in devices}
    return next((kind for kind in (DeviceKind.CUDA, DeviceKind.CPU) if kind in kinds), None)


def send_now(database: Database, settings: Settings) -> None:
    """Send as many jobs as the window allows. Raises BrokerUnreachable; the scheduler will send them later."""
    from qbatch.scheduler.broker import Broker
    from qbatch.scheduler.dispatch import top_up

    broker = Broker(settings)
    try:
        broker.ping()
        top_up(database, broker, settings)
    finally:
        broker.close()

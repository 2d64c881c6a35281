"""One submit: rows first, messages second."""

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
from qbatch.core.storage import Standing, standing
from qbatch.models_db import file_digests, results, workers
from qbatch.models_db.batches import NewJob, add_batch, add_text
from qbatch.models_db.results import Finished
from qbatch.models_db.session import Database
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.lm_eval_files import TaskFiles
from qbatch.scheduler.vram_prediction import predicted_need


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
    """What became of it. ``answered`` jobs need no work; ``live_workers`` may do the others now. ``outdated`` are those
    of the others that have a result of 0.1.0, which knew a folder by its files' sizes and times alone."""

    batch_id: int
    jobs: int
    answered: int
    live_workers: int
    outdated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a folder shows without being read. ``stats`` are its files' by name, None where what is made of them is for
    a worker to say; ``legacy_fingerprint`` is what 0.1.0 called it."""

    dtype: DType
    needs: Mapping[Scheme, int | None]
    stats: Mapping[str, FileStat] | None
    legacy_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A job that is asked for. ``settled`` where its content and its device's kind are known, ``legacy`` where 0.1.0
    would have known them."""

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
    """By which a result is found."""
    return settled.key, settled.protocol.hash


def submit(database: Database, settings: Settings, submission: Submission) -> Receipt:
    """Store a batch. Nothing is half stored: it is one transaction.

    No file is read but headers and configs: a folder's content is known where a worker of this host hashed its files as
    they are. Raises DatabaseUnreachable, and UsageError for a method that this host or the live workers cannot do.
    Redis is not needed: the scheduler sends what is stored (see ``send_now``).
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
    seen = [_look(source, bundle, mounts) for source, bundle in zip(submission.sources, specs, strict=True)]
    with database.read() as session:
        live = workers.live(session, settings.lease_s)
        devices = [(DeviceKind(worker.device_kind), worker.device_name) for worker in live]
        _refuse_device(submission.grid, devices)
        asked = [
            [_settle(spec, one, fingerprint, devices) for spec in bundle]
            for bundle, one, fingerprint in zip(specs, seen, _fingerprints(session, seen), strict=True)
        ]
        flat = [one for bundle in asked for one in bundle]
        finished = _find_finished(session, flat, devices)
        old = _find_old(session, flat)
    answers = _answers(settings, finished)
    # Whoever writes holds up all others on SQLite: everything was looked up before.
    with database.write() as session:
        add_text(session, text_hash, submission.eval_text)
        for sha256, content in submission.tasks.texts.items():
            add_text(session, sha256, content)
        still_there = results.keep(session, set(answers.values()))
        batch_id = add_batch(
            session,
            [[_new_job(one, answers, still_there) for one in bundle] for bundle in asked],
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


def _look(source: SourceRef, specs: Sequence[JobSpec], mounts: Mounts) -> _Seen | None:
    """None for a hub id, and for a folder that does not read: its job will say why when it runs."""
    if not source.is_folder:
        return None
    folder = Path(source.location)
    try:
        headers, config = read_headers(folder), read_config(folder)
        return _Seen(
            dtype=source_dtype(headers),
            needs={spec.scheme: predicted_need(spec, headers, config) for spec in specs},
            # Whether its code may run is the worker's to say, and makes it another model.
            stats=None if names_code(folder) else _stats(folder, mounts),
            legacy_fingerprint=legacy_folder_fingerprint(folder),
        )
    except (JobError, OSError):
        return None


def _stats(folder: Path, mounts: Mounts) -> dict[str, FileStat]:
    return {name: stat_file(path, mounts) for name, path in content_files(folder).items()}


def _fingerprints(session: Session, seen: Sequence[_Seen | None]) -> list[str | None]:
    """The identity of each source all of whose files were hashed as they are."""
    stats = [one.stats if one is not None else None for one in seen]
    known = file_digests.known(session, {stat for files in stats if files is not None for stat in files.values()})
    return [source_fingerprint(files, known) if files is not None else None for files in stats]


def _settle(
    spec: JobSpec, seen: _Seen | None, fingerprint: str | None, devices: Sequence[tuple[DeviceKind, str]]
) -> _Asked:
    if seen is None:
        return _Asked(spec=spec, need=None, settled=None, legacy=None)
    kind = _device_kind(spec.device, devices)

    def settled(name: str | None) -> Settled | None:
        if name is None or kind is None:
            return None
        return settle(spec, fingerprint=name, source=seen.dtype, device_kind=kind)

    return _Asked(
        spec=spec, need=seen.needs[spec.scheme], settled=settled(fingerprint), legacy=settled(seen.legacy_fingerprint)
    )


def _find_finished(
    session: Session, asked: Sequence[_Asked], devices: Sequence[tuple[DeviceKind, str]]
) -> dict[tuple[str, str], Finished]:
    """By (key, protocol), on a device as those that are there now."""
    found: dict[tuple[str, str], Finished] = {}
    for kind in (DeviceKind.CUDA, DeviceKind.CPU):
        own = (one for one in asked if _device_kind(one.spec.device, devices) is kind)
        # With nobody there to measure on, any device of the kind answers.
        names = {name for device, name in devices if device is kind} or None
        found |= results.find_finished(session, {one.pair for one in own if one.pair}, device_names=names)
    return found


def _answers(settings: Settings, finished: Mapping[tuple[str, str], Finished]) -> dict[tuple[str, str], int]:
    """The earlier jobs whose results answer: their checkpoints' files are as they were verified. A doubtful one is left
    to a worker, which reads it."""
    # As far as this machine can see: it may not have the storage mounted.
    sees_storage = settings.storage.is_dir()
    return {
        pair: one.job_id
        for pair, one in finished.items()
        if one.checkpoint_path is None
        or not sees_storage
        or standing(settings.storage, one.checkpoint_path, one.versions) is Standing.SOUND
    }


def _new_job(asked: _Asked, answers: Mapping[tuple[str, str], int], still_there: Collection[int]) -> NewJob:
    return NewJob(
        spec=asked.spec,
        bits=asked.spec.scheme.bits(asked.spec.dtype),
        checkpoint_key=asked.settled.key if asked.settled is not None else None,
        reused_from=_answer(asked, answers, still_there),
        predicted_memory_bytes=asked.need,
    )


def _answer(asked: _Asked, answers: Mapping[tuple[str, str], int], still_there: Collection[int]) -> int | None:
    job_id = answers.get(asked.pair) if asked.pair is not None else None
    return job_id if job_id in still_there else None


def _find_old(session: Session, asked: Sequence[_Asked]) -> set[tuple[str, str]]:
    """What 0.1.0 measured by (key, protocol), which may be another model's."""
    pairs = {one.legacy_pair for one in asked if one.legacy_pair}
    return set(results.find_finished(session, pairs, device_names=None))


def _device_kind(asked: DeviceKind, devices: Sequence[tuple[DeviceKind, str]]) -> DeviceKind | None:
    """Where the job will land; None while nobody can tell."""
    if asked is not DeviceKind.AUTO:
        return asked
    kinds = {kind for kind, _ in devices}
    return next((kind for kind in (DeviceKind.CUDA, DeviceKind.CPU) if kind in kinds), None)


def send_now(database: Database, settings: Settings) -> None:
    """Send what the window has room for. Raises BrokerUnreachable: the scheduler will send it then."""
    from qbatch.scheduler.broker import Broker
    from qbatch.scheduler.dispatch import top_up

    broker = Broker(settings)
    try:
        broker.ping()
        top_up(database, broker, settings)
    finally:
        broker.close()

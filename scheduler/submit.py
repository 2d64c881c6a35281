"""Submit a batch: store its jobs first, chunk by chunk, and send messages second."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy import select

from qbatch.core.domain import DeviceKind, JobSpec, ProtocolOptions, SourceRef, TextRef
from qbatch.core.errors import UsageError
from qbatch.core.file_stat import Mounts
from qbatch.core.methods.registry import is_installed, missing_library
from qbatch.core.recovery import EXTRA, LIBRARY
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.settings import Settings
from qbatch.core.vram_classes import vram_class
from qbatch.models_db import workers
from qbatch.models_db.arrivals import arriving
from qbatch.models_db.batches import NewJob, add_text
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import Database
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.lm_eval_files import TaskFiles
from qbatch.scheduler.submission_lookup import (
    InspectedFolder,
    InspectedSource,
    RequestedJob,
    SubmissionLookup,
    device_kind_of,
    inspect_unchecked,
)

# So many are inserted in a hundredth of a second of CPU time, for which others wait; on a busy machine that is long.
_JOBS_AT_ONCE = 400
# A result may become visible so long after its time was recorded.
_SLOWEST_COMMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A validated request to submit a batch.

    ``more_texts``: by name, texts on which quality is measured too. ``search_text``: the one on which the layers to
    keep at 16 bits are looked for, if the grid asks for that. ``recovery_texts``: those that adapters are made with.
    ``screened`` are the folders that were inspected already (``screen``).
    """

    sources: tuple[SourceRef, ...]
    grid: Grid
    eval_text: str
    more_texts: Mapping[str, str] = field(default_factory=dict)
    recovery_texts: tuple[str, ...] = ()
    search_text: str = ""
    tasks: TaskFiles = field(default_factory=TaskFiles)
    num_fewshot: int | None = None
    task_limit: int | None = None
    name: str | None = None
    priority: int = 0
    time_limit_s: float | None = None
    screened: Mapping[SourceRef, InspectedFolder | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(text.strip() for text in self.eval_texts):
            raise UsageError("the evaluation text is empty")
        if self.more_texts and self.grid.quality is False:
            raise UsageError("quality is measured on further texts, and --measure leaves it out: give one --eval-text")
        if self.tasks.refs and self.grid.quality is False:
            raise UsageError("--tasks are a part of quality, which --measure leaves out")

    @property
    def text_sha256(self) -> str:
        return text_sha256(self.eval_text)

    @property
    def eval_texts(self) -> tuple[str, ...]:
        return (self.eval_text, *self.more_texts.values())

    @property
    def trained_texts(self) -> tuple[str, ...]:
        """Those of ``recovery_texts`` that adapters are trained on."""
        trained = {each.text_sha256 for each in self.grid.recoveries if each.kind.is_trained}
        return tuple(text for text in self.recovery_texts if text_sha256(text) in trained)

    @property
    def text_refs(self) -> tuple[TextRef, ...] | None:
        """The further texts; None without any."""
        return tuple(TextRef(name=name, sha256=text_sha256(text)) for name, text in self.more_texts.items()) or None

    def specs(self) -> Sequence[JobSpec]:
        """The jobs of the first source. Those of the others differ only in the source."""
        protocol = ProtocolOptions(
            eval_text_sha256=self.text_sha256,
            more_texts=self.text_refs,
            tasks=self.tasks.refs,
            num_fewshot=self.num_fewshot,
            task_limit=self.task_limit,
        )
        searching = SearchProtocol(text_sha256=text_sha256(self.search_text)) if self.search_text else None
        return self.grid.bundle(self.sources[0], protocol, searching)


def text_sha256(text: str) -> str:
    """The hash by which a text is stored."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The outcome of ``submit``.

    ``answered`` jobs already have a result; ``live_workers`` can work on the others now. ``outdated`` counts those
    others that have a result of version 0.1.0, which identified a folder only by the sizes and times of its files.
    ``undecided`` are the jobs of which only a worker, which knows the files' contents, can say whether they have one.
    ``warnings`` are what serving engines would make of the checkpoints, and which GPUs are missing, each with the
    number of models.
    """

    batch_id: int
    jobs: int
    answered: int
    live_workers: int
    outdated: int
    undecided: int = 0
    warnings: Mapping[str, int] = field(default_factory=dict)


def submit(
    database: Database,
    settings: Settings,
    submission: Submission,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Receipt:
    """Store a batch. Nobody sees it before it is whole (see ``arrivals``), and others hardly wait for it.

    Only headers and configs are read: a folder's content is known if a worker of this host has hashed its files in
    their current state. Redis is not needed: the scheduler sends what is stored (see ``send_now``). ``on_progress`` is
    called with a number of sources whenever that many more were looked up.

    Raises DatabaseUnreachable, and UsageError for a method that this host or the live workers lack.
    """
    refuse_missing_libraries(submission.grid)
    lookup = start_lookup(database, settings, submission.grid)
    _add_texts(database, submission)
    stored = outdated = undecided = 0
    rejected: set[int] = set()
    warnings: Counter[str] = Counter()
    with arriving(
        database, name=submission.name, priority=submission.priority, time_limit_s=submission.time_limit_s
    ) as batch:
        for chunk in _chunks(submission, settings):
            with database.read() as session:
                looked_up = lookup.look_up(session, chunk)
            batch.be_heard(settings.heartbeat_s)
            answers = lookup.answers(looked_up.finished, lambda: batch.be_heard(settings.heartbeat_s))
            rejected |= {one.job_id for pair, one in looked_up.finished.items() if pair not in answers}
            batch.add([[_new_job(one, answers) for one in bundle] for bundle in looked_up.bundles])
            stored += sum(map(len, looked_up.bundles))
            outdated += looked_up.outdated(answers)
            warnings.update(line for source in chunk if source.folder is not None for line in source.folder.warnings)
            warnings.update(line for bundle in looked_up.bundles if (line := lookup.memory_warning(bundle)))
            undecided += looked_up.undecided
            on_progress(len(chunk))
        answered = batch.publish(partial(lookup.look_again, rejected=rejected))
    return Receipt(
        batch_id=batch.batch_id,
        jobs=stored,
        answered=answered,
        live_workers=len(lookup.devices),
        outdated=outdated,
        undecided=undecided,
        warnings=dict(warnings),
    )


def start_lookup(database: Database, settings: Settings, grid: Grid) -> SubmissionLookup:
    """Raises UsageError if the jobs would run on a device that a method does not support."""
    with database.read() as session:
        live = workers.live(session, settings.lease_s)
        devices = [(DeviceKind(worker.device_kind), worker.device_name) for worker in live]
        gpus = [vram_class(worker.memory_bytes) for worker in live if worker.device_kind == DeviceKind.CUDA]
        began_at = session.execute(select(db_now(-_SLOWEST_COMMIT_S))).scalar_one()
    _refuse_device(grid, devices)
    return SubmissionLookup(
        settings=settings,
        devices=devices,
        began_at=began_at,
        largest_gpu_gib=max(gpus, default=None),
        has_searches=grid.bound is not None,
    )


def _add_texts(database: Database, submission: Submission) -> None:
    """Store the evaluation text and the tasks. On their own: two submits of one text would wait for each other."""
    with database.write() as session:
        searched = [submission.search_text] if submission.search_text else []
        for text in (submission.eval_text, *submission.more_texts.values(), *searched, *submission.recovery_texts):
            add_text(session, text_sha256(text), text)
        for sha256, content in submission.tasks.texts.items():
            add_text(session, sha256, content)


def _chunks(submission: Submission, settings: Settings) -> Iterator[Sequence[InspectedSource]]:
    """The sources, inspected, so many at a time as to be stored quickly, and soon enough to be heard of in time."""
    specs = submission.specs()
    mounts = Mounts()
    chunk: list[InspectedSource] = []
    began = time.monotonic()
    for ref in submission.sources:
        bundle = [replace(spec, source=ref) for spec in specs]
        is_known = ref in submission.screened
        folder = submission.screened[ref] if is_known else inspect_unchecked(ref, bundle, mounts)
        chunk.append(InspectedSource(specs=bundle, folder=folder))
        is_late = time.monotonic() - began >= settings.heartbeat_s / 2
        if is_late or len(chunk) * len(specs) >= _JOBS_AT_ONCE:
            yield chunk
            chunk, began = [], time.monotonic()
    if chunk:
        yield chunk


def refuse_missing_libraries(grid: Grid) -> None:
    """Raises UsageError, with the line that installs what is missing. A job's key contains the versions of its
    libraries."""
    for scheme in grid.every_scheme():
        if (missing := missing_library(scheme.description)) is not None:
            raise UsageError(missing)
        if scheme.recovery is not None and not is_installed(LIBRARY):
            raise UsageError(f"--recover needs {LIBRARY}, which is not installed here: pip install 'qbatch[{EXTRA}]'")


def _refuse_device(grid: Grid, devices: Sequence[tuple[DeviceKind, str]]) -> None:
    """Raises UsageError if the jobs would run on a device that a method does not support."""
    kind = device_kind_of(grid.device, devices)
    for scheme in grid.every_scheme():
        if kind is not None:
            scheme.description.refuse_device(kind)


def _new_job(job: RequestedJob, answers: Mapping[tuple[str, str], int]) -> NewJob:
    return NewJob(
        spec=job.spec,
        bits=job.spec.scheme.bits(job.spec.dtype),
        checkpoint_key=job.settled.key if job.settled is not None else None,
        base_key=job.settled.base_key if job.settled is not None else None,
        reused_from=answers.get(job.pair) if job.pair is not None else None,
        predicted_memory_bytes=job.need,
    )


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

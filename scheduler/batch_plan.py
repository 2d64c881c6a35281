"""What a batch would do, need and take, before anything is stored."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, JobSpec, format_job_id, stored_dtype
from qbatch.core.errors import JobError
from qbatch.core.file_stat import Mounts
from qbatch.core.filesystem import disk_space
from qbatch.core.header_groups import count_groups
from qbatch.core.job_duration import JobWork, PastRun, TimeEstimate, estimate_duration
from qbatch.core.kinds import FLOATS, DType
from qbatch.core.output_size import OutputSize, output_size
from qbatch.core.pass_duration import estimate_passes, search_tokens, training_tokens
from qbatch.core.settings import Settings
from qbatch.core.sources import Header, read_config, read_headers, source_dtype
from qbatch.core.storage import CheckpointState, checkpoint_state
from qbatch.core.vram_classes import VRAM_CLASSES, floor_bytes
from qbatch.models_db import checkpoints, searches
from qbatch.models_db.past_runs import past_runs
from qbatch.models_db.session import Database
from qbatch.scheduler.submission_lookup import (
    InspectedSource,
    RequestedJob,
    SubmissionLookup,
    device_kind_of,
    inspect_unchecked,
)
from qbatch.scheduler.submit import Submission, refuse_missing_libraries, start_lookup
from qbatch.scheduler.vram_prediction import memory_bytes

_AT_ONCE = 200


class Earlier(StrEnum):
    """What is there already. SEARCH: what a search found, which answers every bound. UNKNOWN: only a worker, which has
    the source's files or their checksums, can say."""

    ANSWERED = "answered"
    CHECKPOINT = "checkpoint"
    SEARCH = "search"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedJob:
    """A job that would be stored. Sizes are None where the source's headers are not here.

    ``output`` is None for a baseline, which writes no checkpoint. ``vram_class_gib`` is the smallest class of GPUs with
    more than ``memory_bytes``, both None for a job on a CPU. ``duration_once_searched``: of a search, if what it would
    find is stored. ``answered_by`` is the job whose result it would get.
    """

    spec: JobSpec
    dtype: DType
    output: OutputSize | None = None
    memory_bytes: int | None = None
    vram_class_gib: int | None = None
    duration: TimeEstimate | None = None
    duration_once_searched: TimeEstimate | None = None
    earlier: Earlier = Earlier.UNKNOWN
    answered_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """``free_bytes`` of the storage, None if it is not known; ``live_workers`` could work on the batch now."""

    jobs: tuple[PlannedJob, ...]
    storage: Path
    free_bytes: int | None
    live_workers: int
    warnings: Mapping[str, int]

    @property
    def open_jobs(self) -> tuple[PlannedJob, ...]:
        return tuple(job for job in self.jobs if job.earlier is not Earlier.ANSWERED)

    @property
    def to_write(self) -> tuple[OutputSize, ...]:
        """The sizes of the checkpoints that would be written, each once, as far as they are known."""
        outputs = {
            (job.spec.source, job.spec.scheme, job.spec.search is None): job.output
            for job in self.open_jobs
            if job.output is not None and job.earlier is not Earlier.CHECKPOINT
        }
        return tuple(outputs.values())

    @property
    def has_unknown_sizes(self) -> bool:
        return any(
            job.output is None and not job.spec.scheme.is_baseline and job.earlier is not Earlier.CHECKPOINT
            for job in self.open_jobs
        )

    @property
    def seconds(self) -> float:
        """For which one device is busy, of the jobs with an estimate."""
        return sum(job.duration.seconds for job in self.open_jobs if job.duration is not None)

    @property
    def jobs_without_estimate(self) -> int:
        return sum(job.duration is None for job in self.open_jobs)


def plan_batch(
    database: Database, settings: Settings, submission: Submission, *, here: DeviceKind | None = None
) -> BatchPlan:
    """Look everything up that ``submit`` would, and store nothing. ``here``: the kind of device of this machine's
    workers, if they are expected where none is live.

    Raises DatabaseUnreachable, and UsageError for a method that this host or the live workers lack.
    """
    refuse_missing_libraries(submission.grid)
    lookup = start_lookup(database, settings, submission.grid)
    jobs: list[PlannedJob] = []
    warnings: dict[str, int] = {}
    with database.read() as session:
        runs = past_runs(session)
        for chunk in _chunks(submission):
            looked_up = lookup.look_up(session, chunk)
            answers = lookup.answers(looked_up.finished)
            there = _published(session, settings, [one for bundle in looked_up.bundles for one in bundle])
            there |= _searched(session, [one for bundle in looked_up.bundles for one in bundle])
            for source, bundle in zip(chunk, looked_up.bundles, strict=True):
                planned = _planned(bundle, lookup, runs, here)
                jobs += (_with_earlier(job, one, answers, there) for job, one in zip(planned, bundle, strict=True))
                said = [*(source.folder.warnings if source.folder is not None else ()), lookup.memory_warning(bundle)]
                for line in filter(None, said):
                    warnings[line] = warnings.get(line, 0) + 1
    return BatchPlan(
        jobs=tuple(jobs),
        storage=settings.storage,
        free_bytes=_free_bytes(settings.storage),
        live_workers=len(lookup.devices),
        warnings=warnings,
    )


def _chunks(submission: Submission) -> Iterator[Sequence[InspectedSource]]:
    specs, mounts = submission.specs(), Mounts()
    chunk: list[InspectedSource] = []
    for ref in submission.sources:
        bundle = [replace(spec, source=ref) for spec in specs]
        is_known = ref in submission.screened
        folder = submission.screened[ref] if is_known else inspect_unchecked(ref, bundle, mounts)
        chunk.append(InspectedSource(specs=bundle, folder=folder))
        if len(chunk) == _AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _planned(
    bundle: Sequence[RequestedJob], lookup: SubmissionLookup, runs: Sequence[PastRun], here: DeviceKind | None
) -> list[PlannedJob]:
    """The jobs of one source, with the sizes that its headers tell."""
    source = bundle[0].spec.source
    headers: tuple[Header, ...] = ()
    if source.is_folder:
        try:
            headers, config = read_headers(Path(source.location)), read_config(Path(source.location))
        except (JobError, OSError):  # pickles, or a folder that only the workers see: nothing is known of it here
            headers = ()
    parameters = sum(t.numel for header in headers for t in header.tensors if t.dtype in FLOATS) or None
    is_searched = any(one.spec.search is not None for one in bundle)
    groups = count_groups(headers, config) if is_searched and headers else 0
    # Where nothing is live, the next worker is expected to be one of this machine, else like the last one.
    next_one = here or (runs[0].work.device_kind if runs else None)
    jobs = []
    for one in bundle:
        spec = one.spec
        kind = device_kind_of(spec.device, lookup.devices)
        expected = kind or next_one
        work = JobWork.of(spec, expected, parameters) if expected is not None else None
        duration = None if work is None else _duration(spec, work, runs, groups)
        job = PlannedJob(spec=spec, dtype=spec.dtype, duration=duration)
        if spec.search is not None and work is not None:
            job = replace(job, duration_once_searched=_of_one_point(spec, work, runs))
        jobs.append(_with_sizes(job, headers, config, kind or here) if headers else job)
    return jobs


def _duration(spec: JobSpec, work: JobWork, runs: Sequence[PastRun], groups: int) -> TimeEstimate | None:
    """The time of a job. That of a search includes one job that publishes what it found; there may be three.
    ``groups``: of the model's layers; 0 where they are not known."""
    estimate = estimate_duration(work, runs)
    if spec.search is not None:
        if estimate is None and groups:
            estimate = estimate_passes(work, search_tokens(spec.search.protocol, groups), runs)
        return None if estimate is None else estimate.followed_by(_of_one_point(spec, work, runs))
    recovery = spec.scheme.recovery
    if recovery is None or not recovery.kind.is_trained or estimate is None or not estimate.is_least:
        return estimate
    training = estimate_passes(work, training_tokens(recovery), runs)
    return estimate if training is None else replace(training.followed_by(estimate) or training, is_least=False)


def _of_one_point(spec: JobSpec, work: JobWork, runs: Sequence[PastRun]) -> TimeEstimate | None:
    return estimate_duration(JobWork.of(replace(spec, search=None), work.device_kind, work.parameters), runs)


def _with_sizes(
    job: PlannedJob, headers: tuple[Header, ...], config: Mapping[str, object], kind: DeviceKind | None
) -> PlannedJob:
    spec = job.spec
    dtype = stored_dtype(spec.dtype, source_dtype(headers))
    output = None if spec.scheme.is_baseline else output_size(headers, config, spec.scheme, spec.dtype)
    if output is not None and spec.search is not None:
        output = replace(output, off_by=None)  # at least that: some layers stay at 16 bits
    if kind is DeviceKind.CPU:
        return replace(job, dtype=dtype, output=output)
    tensors = [tensor for header in headers for tensor in header.tensors]
    need = memory_bytes(tensors, config, spec.loaded_scheme, dtype, spec.protocol.for_device(DeviceKind.CUDA))
    fitting = next((size for size in VRAM_CLASSES if floor_bytes(size) > need), None)
    # The smallest class has no least size, but takes what needs less than any other has.
    smallest = VRAM_CLASSES[0] if need < floor_bytes(VRAM_CLASSES[1]) else fitting
    return replace(job, dtype=dtype, output=output, memory_bytes=need, vram_class_gib=smallest)


def _published(session: Session, settings: Settings, jobs: Sequence[RequestedJob]) -> set[str]:
    """The keys of the jobs' checkpoints that are on record, and there if this machine sees the storage."""
    keys = {one.settled.key for one in jobs if one.settled is not None and not one.spec.scheme.is_baseline}
    paths = checkpoints.paths(session, keys)
    if not settings.storage.is_dir():
        return set(paths)
    return {
        key for key, path in paths.items() if checkpoint_state(settings.storage, path, None) is not CheckpointState.GONE
    }


def _searched(session: Session, jobs: Sequence[RequestedJob]) -> set[str]:
    """The keys of the searches whose results are stored."""
    keys = {one.settled.key for one in jobs if one.settled is not None and one.spec.search is not None}
    return set(searches.newest(session, keys)) if keys else set()


def _with_earlier(
    job: PlannedJob, asked: RequestedJob, answers: Mapping[tuple[str, str], int], there: Collection[str]
) -> PlannedJob:
    answer = answers.get(asked.pair) if asked.pair is not None else None
    if answer is not None:
        return replace(job, earlier=Earlier.ANSWERED, answered_by=format_job_id(answer))
    if asked.settled is None:
        return job
    if asked.settled.key not in there:
        return replace(job, earlier=Earlier.NOTHING)
    if asked.spec.search is None:
        return replace(job, earlier=Earlier.CHECKPOINT)
    return replace(job, earlier=Earlier.SEARCH, duration=job.duration_once_searched)


def _free_bytes(storage: Path) -> int | None:
    """The free bytes of the file system that holds the storage, or will hold it; None if they are not known."""
    try:
        folder = next(path for path in (storage, *storage.parents) if path.is_dir())
        space = disk_space(folder)
    except OSError:  # it cannot be looked at from here; whoever starts a worker is told why
        return None
    return None if space is None else space.free

"""What is known about the jobs of a submit before a worker has seen them: headers, checksums, earlier results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, DType, JobSpec, Scheme, SourceRef
from qbatch.core.errors import JobError
from qbatch.core.file_stat import FileStat, Mounts, stat_file
from qbatch.core.identity import Settled, settle, source_fingerprint
from qbatch.core.legacy_identity import legacy_folder_fingerprint
from qbatch.core.model_files import content_files, names_code
from qbatch.core.settings import Settings
from qbatch.core.source_checks import check_contents
from qbatch.core.sources import Header, is_pickled, pickle_files, read_config, read_headers, source_dtype
from qbatch.core.storage import CheckpointState, checkpoint_state
from qbatch.core.transformers_names import refuse_unknown_architecture
from qbatch.core.vram_classes import floor_bytes
from qbatch.models_db import file_digests, finished_results, skip_list_keys
from qbatch.models_db.arrivals import answerable_since, known_searches
from qbatch.models_db.batches import spec_of
from qbatch.models_db.finished_results import Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedFolder:
    """What is known about a folder from its headers and config.

    ``stats`` maps each file name to its state; None for a model with its own code, whose identity depends on whether a
    worker runs that code. ``legacy_fingerprint`` is its identity in version 0.1.0; ``warnings`` are of serving engines.
    """

    dtype: DType
    needs: Mapping[Scheme, int | None]
    stats: Mapping[str, FileStat] | None
    legacy_fingerprint: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedJob:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedSource:
    """A source with its jobs. ``folder`` is None where nothing is known of it, as of a hub id."""

    specs: Sequence[JobSpec]
    folder: InspectedFolder | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """What the database knows about the jobs of some sources.

    ``finished`` maps (key, protocol hash) to an earlier result. ``old`` holds the pairs that 0.1.0 has measured,
    perhaps for a different model.
    """

    bundles: Sequence[Sequence[RequestedJob]]
    finished: Mapping[tuple[str, str], Finished]
    old: Collection[tuple[str, str]]

    @property
    def undecided(self) -> int:
        """How many jobs may have an earlier result that can only be found once the files' contents are known."""
        return sum(one.settled is None and not one.spec.force for bundle in self.bundles for one in bundle)

    def outdated(self, answers: Mapping[tuple[str, str], int]) -> int:
        jobs = (one for bundle in self.bundles for one in bundle)
        return sum(one.legacy_pair in self.old and one.pair not in answers for one in jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionLookup:
    """Looks up what is known about jobs. ``devices`` are those of the live workers, by kind and name;
    ``largest_gpu_gib`` is the VRAM class of the largest, None without a live GPU. ``has_searches``: whether some of the
    jobs look for layers to keep at 16 bits."""

    settings: Settings
    devices: Sequence[tuple[DeviceKind, str]]
    began_at: datetime
    largest_gpu_gib: int | None = None
    has_searches: bool = False

    def look_up(self, session: Session, sources: Sequence[InspectedSource]) -> LookedUp:
        folders = [source.folder for source in sources]
        bundles = [
            [_settle(spec, source.folder, fingerprint, self.devices) for spec in source.specs]
            for source, fingerprint in zip(sources, _fingerprints(session, folders), strict=True)
        ]
        bundles = _with_known_skip_lists(session, bundles)
        flat = [one for bundle in bundles for one in bundle]
        legacy = {one.legacy_pair for one in flat if one.legacy_pair}
        found = self._find_finished(session, [(one.spec.device, one.pair) for one in flat if one.pair])
        return LookedUp(
            bundles=bundles,
            finished={pair: one for bundle in bundles for pair, one in _answers(bundle, found).items()},
            old=set(finished_results.find_finished(session, legacy, device_names=None)),
        )

    def memory_warning(self, bundle: Sequence[RequestedJob]) -> str | None:
        """A sentence if a job of one source is predicted to need more memory than any live GPU has; else None."""
        largest = self.largest_gpu_gib
        if largest is None or not any(one.need is not None and one.need >= floor_bytes(largest) for one in bundle):
            return None
        return (
            f"some schemes are predicted to need more memory than the largest live GPU has, one of {largest} GiB, on "
            "which they are tried alone"
        )

    def answers(
        self, finished: Mapping[tuple[str, str], Finished], after_each: Callable[[], None] = lambda: None
    ) -> dict[tuple[str, str], int]:
        """The ids of earlier jobs whose results can be reused, because their checkpoints are as they were verified.

        A checkpoint whose files must be read to know is left to a worker. ``after_each`` is called whenever one was
        looked at, which takes a while on a slow storage.
        """
        # If this machine has not mounted the storage, the checkpoints cannot be checked here.
        sees_storage = self.settings.storage.is_dir()
        found: dict[tuple[str, str], int] = {}
        for pair, one in finished.items():
            if not sees_storage or self._is_sound(one):
                found[pair] = one.job_id
            after_each()
        return found

    def _is_sound(self, one: Finished) -> bool:
        storage = self.settings.storage
        return all(checkpoint_state(storage, part.path, part.versions) is CheckpointState.SOUND for part in one.parts)

    def look_again(self, session: Session, batch_id: int, rejected: Collection[int] = ()) -> int:
        """End the jobs whose answers were recorded since the lookup began, and return how many there were. A search
        whose answer is stored goes on with the job of its first point. ``rejected``: jobs whose results the lookup
        found, but not their checkpoints as they were verified."""
        if self.has_searches:
            # Imported here, and below, because most submits find nothing, and the state machine is a tenth of their
            # imports.
            from qbatch.models_db import jobs, searches

            asked_for = {job: str(job.checkpoint_key) for job in known_searches(session, batch_id)}
            known = searches.newest(session, set(asked_for.values()))
            for job, key in asked_for.items():
                if key in known:
                    jobs.answer_unclaimed_search(session, job, key, known[key])
        waiting = {
            job: (job.checkpoint_key, spec.protocol.for_device(kind).hash)
            for job in answerable_since(session, batch_id, self.began_at)
            if (kind := device_kind_of((spec := spec_of(job)).device, self.devices)) is not None and job.checkpoint_key
        }
        asked = [(DeviceKind(job.device), pair) for job, pair in waiting.items()]
        # The rest is left to a worker: whether a row without a comparison answers depends on the baselines of the
        # batch, and of what was not measured just now the storage would have to be asked, for which everybody would
        # wait.
        answers = {
            pair: one.job_id
            for pair, one in self._find_finished(session, asked).items()
            if not one.lacks_outputs and one.finished_at >= self.began_at and one.job_id not in rejected
        }
        kept = finished_results.keep(session, set(answers.values()))
        answered = {job: answers[pair] for job, pair in waiting.items() if answers.get(pair) in kept}
        if answered:
            from qbatch.models_db import jobs

            for job, job_id in answered.items():
                jobs.answer_unclaimed(session, job, job_id)
        return len(answered)

    def _find_finished(
        self, session: Session, asked: Sequence[tuple[DeviceKind, tuple[str, str]]]
    ) -> dict[tuple[str, str], Finished]:
        """Earlier results by (key, protocol hash), measured on a device with the name of one that is live now."""
        finished: dict[tuple[str, str], Finished] = {}
        for kind in (DeviceKind.CUDA, DeviceKind.CPU):
            pairs = {pair for device, pair in asked if device_kind_of(device, self.devices) is kind}
            # If no worker of this kind is live, results of any device of the kind are accepted.
            names = {name for device, name in self.devices if device is kind} or None
            finished |= finished_results.find_finished(session, pairs, device_names=names)
        return finished


def _answers(
    bundle: Sequence[RequestedJob], found: Mapping[tuple[str, str], Finished]
) -> Mapping[tuple[str, str], Finished]:
    """What answers jobs of this source."""
    asked = {one.pair: one.spec.scheme.is_baseline for one in bundle if one.pair is not None}
    baselines = {pair for pair, is_baseline in asked.items() if is_baseline}
    return finished_results.answers_beside(baselines, {pair: found[pair] for pair in asked if pair in found})


def inspect(source: SourceRef, specs: Sequence[JobSpec], mounts: Mounts) -> InspectedFolder | None:
    """What the files of a folder tell. None for a hub id, and for pickles that may be converted: nothing is known yet.

    Raises a JobError, or OSError, for a folder that no worker could use.
    """
    if not source.is_folder:
        return None
    folder = Path(source.location)
    config = read_config(folder)
    refuse_unknown_architecture(config)
    if specs[0].allow_pickle and is_pickled(folder):
        pickle_files(folder)
        return None
    headers = read_headers(folder)
    check_contents(folder, config, headers)
    if any(spec.search is not None for spec in specs):
        from qbatch.scheduler.unmeetable_bound import refuse_unmeetable_bound

        refuse_unmeetable_bound(specs, headers, config)
    return _described(folder, config, headers, specs, mounts)


def inspect_unchecked(source: SourceRef, specs: Sequence[JobSpec], mounts: Mounts) -> InspectedFolder | None:
    """As ``inspect``, without the checks. None also for a folder that cannot be read here: if a worker cannot read it
    either, the job fails with the reason."""
    if not source.is_folder:
        return None
    folder = Path(source.location)
    try:
        return _described(folder, read_config(folder), read_headers(folder), specs, mounts)
    except (JobError, OSError):
        return None


def _described(
    folder: Path, config: Mapping[str, Any], headers: tuple[Header, ...], specs: Sequence[JobSpec], mounts: Mounts
) -> InspectedFolder:
    # Imported here, because a list of hub ids needs neither.
    from qbatch.scheduler.loader_warnings import loader_warnings
    from qbatch.scheduler.vram_prediction import predicted_need

    dtype = source_dtype(headers)
    return InspectedFolder(
        dtype=dtype,
        needs={spec.loaded_scheme: predicted_need(spec, headers, config) for spec in specs},
        # Each worker decides whether the model's own code may run, which makes it a different model.
        stats=None if names_code(folder) else _stats(folder, mounts),
        legacy_fingerprint=legacy_folder_fingerprint(folder),
        warnings=tuple(loader_warnings(specs, headers, config, dtype)),
    )


def _stats(folder: Path, mounts: Mounts) -> dict[str, FileStat]:
    return {name: stat_file(path, mounts) for name, path in content_files(folder).items()}


def _fingerprints(session: Session, folders: Sequence[InspectedFolder | None]) -> list[str | None]:
    """The identity of each source; None unless all its files were hashed in their current state."""
    stats = [folder.stats if folder is not None else None for folder in folders]
    known = file_digests.known(session, {stat for files in stats if files is not None for stat in files.values()})
    return [source_fingerprint(files, known) if files is not None else None for files in stats]


def _settle(
    spec: JobSpec, folder: InspectedFolder | None, fingerprint: str | None, devices: Sequence[tuple[DeviceKind, str]]
) -> RequestedJob:
    if folder is None:
        return RequestedJob(spec=spec, need=None, settled=None, legacy=None)
    kind = device_kind_of(spec.device, devices)

    def settled(name: str | None) -> Settled | None:
        if name is None or kind is None:
            return None
        return settle(spec, fingerprint=name, source=folder.dtype, device_kind=kind)

    return RequestedJob(
        spec=spec,
        need=folder.needs[spec.loaded_scheme],
        settled=settled(fingerprint),
        legacy=settled(folder.legacy_fingerprint),
    )


def _with_known_skip_lists(session: Session, bundles: list[list[RequestedJob]]) -> list[list[RequestedJob]]:
    """Only a worker can find out what the names in a skip list mean, because that needs the model. A job whose list no
    worker has resolved yet has no key."""
    listed = [one.settled for bundle in bundles for one in bundle if one.settled and one.spec.scheme.skip_modules]
    spelled = {key for settled in listed for key in (settled.key, settled.base_key) if key is not None}
    keys = skip_list_keys.known(session, spelled) if spelled else {}
    return [[_with_key(one, keys) if one.spec.scheme.skip_modules else one for one in bundle] for bundle in bundles]


def _with_key(job: RequestedJob, keys: Mapping[str, str]) -> RequestedJob:
    settled = job.settled
    if settled is None or settled.key not in keys or settled.base_key not in (None, *keys):
        return replace(job, settled=None)
    base_key = None if settled.base_key is None else keys[settled.base_key]
    return replace(job, settled=replace(settled, key=keys[settled.key], base_key=base_key))


def device_kind_of(requested: DeviceKind, devices: Sequence[tuple[DeviceKind, str]]) -> DeviceKind | None:
    """The kind of device on which the job will run; None if that cannot be known yet."""
    if requested is not DeviceKind.AUTO:
        return requested
    kinds = {kind for kind, _ in devices}
    return next((kind for kind in (DeviceKind.CUDA, DeviceKind.CPU) if kind in kinds), None)

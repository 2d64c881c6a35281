"""The messages between a runner and its supervisor, sent over one pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qbatch.core.digest import Checksums
from qbatch.core.domain import Claim, DeviceKind, Protocol, SourceRef, Stage
from qbatch.core.file_stat import FileStat
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.measured.measurement import Measurement
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.sources.source_policy import SourcePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a runner needs to do its work. ``texts`` holds evaluation texts and packed tasks by their sha256.

    ``log_path`` is the runner's log, for all that it prints. The jobs' logs are in the same folder. ``device_uuid``:
    that of the GPU; None on a CPU. ``database``: the id of the jobs' database.
    """

    claims: tuple[Claim, ...]
    texts: Mapping[str, str]
    device_kind: DeviceKind
    device_name: str
    storage: Path
    staging: Path
    cache: Path
    cache_bytes: int
    policy: SourcePolicy
    lease_s: float
    log_path: Path
    device_uuid: str | None = None
    database: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOrder:
    """What to fetch ahead, and where to."""

    source: SourceRef
    cache: Path
    cache_bytes: int
    policy: SourcePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesSeen:
    """Files in their current state, whose checksums are needed. The supervisor replies with ``FilesKnown``."""

    stats: tuple[FileStat, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesKnown:
    """The checksums of the files that were hashed in that state before."""

    digests: Mapping[FileStat, Checksums]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesHashed:
    """Checksums to store."""

    digests: Mapping[FileStat, Checksums]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The identity of each job, by job id. The supervisor replies with ``Answered``."""

    jobs: Mapping[int, JobIdentity]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """``key`` is that of the checkpoint, or of what a search finds; ``legacy_key`` that of version 0.1.0 for the same
    content, if it is known; ``base_key`` that of the checkpoint to which an adapter belongs. ``spelled_keys`` maps the
    keys that the job's skip list has as it is spelt to those that it has. ``speed_key``: that by which it may have the
    speed of another model (``Details.speed_key``)."""

    key: str
    legacy_key: str | None
    protocol_hash: str
    base_key: str | None = None
    spelled_keys: Mapping[str, str] = field(default_factory=dict)
    speed_key: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all checkpoints that the job needs."""
        return (self.key,) if self.base_key is None else (self.base_key, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The supervisor's answer to ``Resolved``.

    ``job_ids`` are jobs that the runner must not work on: an earlier result answers them, or another runner is writing
    their checkpoint. ``unverified`` are checkpoints (path → key) whose results would answer more jobs if the files are
    unchanged: the runner verifies them and asks again. ``paths`` maps keys to the paths of existing checkpoints.
    ``speeds`` are those that are known of jobs that are not answered.
    """

    job_ids: frozenset[int]
    unverified: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    speeds: Mapping[int, KnownSpeed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVerified:
    """The files of a checkpoint were read and match what was published."""

    published: Published


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """The runner now works on these jobs, and no others, and is in ``stage``."""

    job_ids: tuple[int, ...]
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Bytes read and written in the current stage."""

    job_ids: tuple[int, ...]
    bytes_read: int
    bytes_written: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """What the runner measures of these jobs from now on, in a few words: ``speed, round 2/3``."""

    job_ids: tuple[int, ...]
    step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReady:
    """The job's checkpoint is published. Sent again when its files were found unchanged after the measurement."""

    job_id: int
    published: Published


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The job is done."""

    job_id: int
    measurement: Measurement
    protocol: Protocol
    checkpoint_path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """The job's search is done. ``key`` is that of what it found."""

    job_id: int
    key: str
    found: FinishedSearch


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The job failed with an error of this kind. ``needed_bytes`` is set for DiskFull only."""

    job_id: int
    kind: str
    message: str
    needed_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The runner has prepared itself and waits for its ``Order``. Only one that stands by says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingTimed:
    """For a while the runner times nothing, so the next source may be fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementsOver:
    """The runner times nothing more and measures no more memory. What is left is to confirm files and to report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The runner has finished. Jobs that it has not reported return to the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchingAhead:
    """The process ``pid`` fetches the next source. The runner stops it while it times something."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Sent by the supervisor about every second to show that it is alive."""


Question = FilesSeen | Resolved
Reply = FilesKnown | Answered
RunnerMessage = (
    Question
    | FilesHashed
    | CheckpointVerified
    | Entered
    | Progressed
    | Stepped
    | CheckpointReady
    | Measured
    | Searched
    | Failed
    | NothingTimed
    | MeasurementsOver
    | Ended
)

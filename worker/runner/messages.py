"""What a runner and its supervisor say to each other, over one pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qbatch.core.digest import Checksums
from qbatch.core.domain import Claim, DeviceKind, Measurement, Protocol, Stage
from qbatch.core.file_stat import FileStat
from qbatch.worker.checkpoints.publish import Published
from qbatch.worker.sources.fetch import SourcePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All that a runner needs to know. ``texts`` are the evaluation texts and packed tasks by their sha256."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesSeen:
    """Files in the state in which they are to be used. The supervisor replies with a ``FilesKnown``."""

    stats: tuple[FileStat, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesKnown:
    """The digests of those of the files that were hashed in that state before."""

    digests: Mapping[FileStat, Checksums]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesHashed:
    """Digests to remember."""

    digests: Mapping[FileStat, Checksums]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """job id → its identity. The supervisor replies with an ``Answered``."""

    jobs: Mapping[int, JobIdentity]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """``key`` is the checkpoint's, ``legacy_key`` what 0.1.0 made of the same content, where that is certain."""

    key: str
    legacy_key: str | None
    protocol_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """``job_ids``: those that the runner leaves alone, since an earlier result answers them, or another runner writes
    their checkpoint now. ``doubtful``: checkpoints (path → key) whose results would answer others, if their files are
    still what was published: the runner verifies them and asks again. ``paths``: where a key's checkpoint lies."""

    job_ids: frozenset[int]
    unverified: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVerified:
    """A checkpoint's files are what was published."""

    published: Published


@dataclass(frozen=True, slots=True, kw_only=True)
class Entered:
    """These jobs' own work is at ``stage`` now; the runner works on no others."""

    job_ids: tuple[int, ...]
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """Bytes of the current stage's reading and writing."""

    job_ids: tuple[int, ...]
    bytes_read: int
    bytes_written: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReady:
    """The job's checkpoint is published; said again once its files were seen not to change while it was measured."""

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
class Failed:
    """The job failed with an error of this kind; ``needed_bytes`` is a DiskFull's."""

    job_id: int
    kind: str
    message: str
    needed_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The runner is through; jobs it said nothing of go back to the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """From the supervisor, every second or so: still here."""


Question = FilesSeen | Resolved
Reply = FilesKnown | Answered
RunnerMessage = (
    Question | FilesHashed | CheckpointVerified | Entered | Progressed | CheckpointReady | Measured | Failed | Ended
)

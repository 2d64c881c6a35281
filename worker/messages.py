"""What a runner and its supervisor say to each other, over one pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models_db.domain import Claim, DeviceKind, Measurement, Protocol, Stage
from worker.checkpoint import Published
from worker.fetch import Doors


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
    doors: Doors
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """job id → (checkpoint key, protocol hash). The supervisor replies with an ``Answered``."""

    keys: Mapping[int, tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The jobs that an earlier result answers: the runner leaves them alone."""

    job_ids: frozenset[int]


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
    """The job's checkpoint is published."""

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


RunnerMessage = Resolved | Entered | Progressed | CheckpointReady | Measured | Failed | Ended

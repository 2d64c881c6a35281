"""The values that describe a job: frozen dataclasses used by every package. Standard library only.

Schemes, protocols and ids have files of their own, and are imported from here as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qbatch.core.content_hash import content_hash as content_hash
from qbatch.core.ids import LARGEST_ID as LARGEST_ID
from qbatch.core.ids import LATEST as LATEST
from qbatch.core.ids import batch_number as batch_number
from qbatch.core.ids import find_id as find_id
from qbatch.core.ids import format_batch_id as format_batch_id
from qbatch.core.ids import format_job_id as format_job_id
from qbatch.core.ids import job_number as job_number
from qbatch.core.kinds import DeviceKind as DeviceKind
from qbatch.core.kinds import DType as DType
from qbatch.core.measurement_protocol import Protocol as Protocol
from qbatch.core.measurement_protocol import ProtocolOptions as ProtocolOptions
from qbatch.core.measurement_protocol import TaskRef as TaskRef
from qbatch.core.measurement_protocol import TextRef as TextRef
from qbatch.core.methods.registry import Method as Method
from qbatch.core.quantization_scheme import BASELINE as BASELINE
from qbatch.core.quantization_scheme import Scheme as Scheme
from qbatch.core.quantization_scheme import stored_dtype as stored_dtype
from qbatch.core.search.search_request import SearchRequest


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in ENDED_STATES


class WorkerState(StrEnum):
    """READY takes jobs; DRAINING finishes those that it has. A QUARANTINED one takes none: its device is sick."""

    READY = "ready"
    DRAINING = "draining"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


LOST = "lost"
"""How a worker is listed that has been silent for a lease, whatever its state was."""

OPEN_STATES = (JobState.QUEUED, JobState.RUNNING)
ENDED_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Stage(StrEnum):
    """What a running job is doing."""

    FETCHING = "fetching"
    SEARCHING = "searching"
    QUANTIZING = "quantizing"
    PUBLISHING = "publishing"
    LOADING = "loading"
    BENCHMARKING = "benchmarking"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """A model as the user named it. ``location`` is what workers open: a hub id or the absolute path of a folder."""

    name: str
    location: str
    revision: str | None = None
    is_folder: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One model × one scheme × one protocol, as submitted. ``allow_pickle`` accepts a source that has only pickles.

    With ``search``, the job looks for the layers that ``scheme`` leaves at 16 bits, instead of applying it.
    """

    source: SourceRef
    scheme: Scheme
    dtype: DType
    device: DeviceKind
    protocol: ProtocolOptions
    force: bool = False
    allow_pickle: bool = False
    search: SearchRequest | None = None

    @property
    def loaded_scheme(self) -> Scheme:
        """The scheme of the largest model that the job loads. A search loads the unquantized model."""
        return self.scheme if self.search is None else BASELINE

    @property
    def text_hashes(self) -> tuple[str, ...]:
        """The sha256 of each stored text that the job needs."""
        searched = () if self.search is None else (self.search.protocol.text_sha256,)
        recovery = self.scheme.recovery
        recovered = () if recovery is None or recovery.text_sha256 is None else (recovery.text_sha256,)
        return (*self.protocol.text_hashes, *searched, *recovered)


Token = tuple[int, int]
"""(job_id, attempt): what a worker must show to change a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A worker's right to run one attempt of one job. (job_id, attempt) is the fencing token."""

    job_id: int
    attempt: int
    spec: JobSpec
    time_limit_s: float | None = None

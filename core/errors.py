"""Every error qbatch raises on purpose. Its class says what happened; what is done about a job's is the business of
``retry_policy``.

QbatchError
├── UsageError                  the request cannot be understood: exit 2
├── ServiceUnreachable          a service that qbatch needs does not answer: exit 3
│   ├── BrokerUnreachable
│   ├── DatabaseUnreachable
│   │   ├── DatabaseRefused     it answers with an error that waiting will not mend
│   │   └── WrongDatabase       not one to wait for: whoever works on it stops
│   │       ├── ForeignSchema
│   │       ├── DatabaseOfAnotherHost
│   │       └── DatabaseReplaced                                exit 5
│   ├── StorageUnavailable
│   ├── StackNotRunning
│   └── NoSuchDevice
├── WaitTimeout                 time ran out while waiting: exit 4
└── JobError                    a job ended badly; ``kind`` is its name in rows and messages
    ├── DeviceError
    │   └── ModelFault          the job's own doing
    └── CudaOom, HostOom, WorkerLost, StorageError, FetchError, JobTimeout, SourceChanged, DiskFull, SourceNotFound,
        SourceGated, SourceCorrupt, UnsafeSource, Unsupported, QuantizationError, BenchmarkError, InternalError
"""

from __future__ import annotations

from typing import ClassVar

from qbatch.core.control_characters import escape_controls


class QbatchError(Exception):
    """Base of all. ``str(error)`` is one line fit for a terminal, whatever it quotes."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return escape_controls(super().__str__())


class UsageError(QbatchError):
    """The request is malformed or asks for what cannot be."""

    exit_code = 2


class ServiceUnreachable(QbatchError):
    """A service that the command needs does not answer."""

    exit_code = 3


class BrokerUnreachable(ServiceUnreachable):
    """Redis does not answer."""


class DatabaseUnreachable(ServiceUnreachable):
    """The database does not take or give what it is asked: as a rule it does not answer. What it was to keep is kept
    elsewhere meanwhile."""


class DatabaseRefused(DatabaseUnreachable):
    """The database answers with an error that is none of its being away: of what was written, or of the schema."""


class WrongDatabase(DatabaseUnreachable):
    """The database answers, and is not one that this process can work with. It is not waited for."""


class ForeignSchema(WrongDatabase):
    """The database's schema is a newer version's that this one's code does not work with, or was changed by hand."""


class DatabaseOfAnotherHost(WrongDatabase):
    """SQLite on a network file system, where another host works on it."""


class DatabaseReplaced(WrongDatabase):
    """The database is gone, or another one stands in its place. A process that ends with it is not started again: it
    would make an empty one."""

    exit_code = 5


class StorageUnavailable(ServiceUnreachable):
    """The storage folder cannot be written."""


class StackNotRunning(ServiceUnreachable):
    """Nothing is running that could do the work waited for."""


class NoSuchDevice(ServiceUnreachable):
    """A GPU was asked for that this machine does not have, or that is taken."""


class WaitTimeout(QbatchError):
    """The time given to wait ran out."""

    exit_code = 4


class JobError(QbatchError):
    """A job ended badly."""

    kind: ClassVar[str] = "internal_error"


class CudaOom(JobError):
    """The GPU's memory does not hold the job."""

    kind = "cuda_oom"


class HostOom(JobError):
    """The kernel killed the runner for its memory."""

    kind = "host_oom"


class WorkerLost(JobError):
    """The worker or its runner died without a word."""

    kind = "worker_lost"


class StorageError(JobError):
    """Shared storage failed while reading or writing."""

    kind = "storage_error"


class FetchError(JobError):
    """The source could not be fetched this time."""

    kind = "fetch_error"


class DeviceError(JobError):
    """The GPU faulted, other than by running out of memory."""

    kind = "device_error"


class JobTimeout(JobError):
    """The job ran past its time limit."""

    kind = "timeout"


class SourceChanged(JobError):
    """The files of the source, or of a checkpoint, changed while the job used them."""

    kind = "source_changed"


class DiskFull(JobError):
    """Storage has no room for the checkpoint. ``needed_bytes`` is how much would do, where that was known before any of
    it was written; a job that a full disk cuts short in its middle again and again fails."""

    kind = "disk_full"

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class SourceNotFound(JobError):
    """No such folder, or no such repository or revision on the hub."""

    kind = "source_not_found"


class SourceGated(JobError):
    """The hub wants a token or an accepted licence."""

    kind = "source_gated"


class SourceCorrupt(JobError):
    """The source's files contradict themselves or lack what the model needs."""

    kind = "source_corrupt"


class UnsafeSource(JobError):
    """The source would run code: a pickle, or remote code."""

    kind = "unsafe_source"


class Unsupported(JobError):
    """qbatch does not do this to such a model."""

    kind = "unsupported"


class QuantizationError(JobError):
    """Quantization itself failed."""

    kind = "quantization_error"


class BenchmarkError(JobError):
    """The published checkpoint could not be measured."""

    kind = "benchmark_error"


class ModelFault(DeviceError):
    """The model's own work stopped the GPU: an index beyond a table, a product that the library does not do. The
    process is spoilt as after any fault of a device, but neither the device nor another job is to blame.

    It crosses as the BenchmarkError that it is to the job.
    """

    kind = BenchmarkError.kind


class InternalError(JobError):
    """A defect of qbatch; the traceback is in the job's log."""

    kind = "internal_error"


# A ModelFault is of none of its own: it crosses as a BenchmarkError.
_BY_KIND: dict[str, type[JobError]] = {cls.kind: cls for cls in JobError.__subclasses__()}

ERROR_KINDS: tuple[str, ...] = tuple(_BY_KIND)


OUR_DEFECTS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)
"""What only a mistake in code raises: never taken for a fault of a hub, a file or a model."""


def job_error(kind: str, message: str, needed_bytes: int | None = None) -> JobError:
    """Rebuild an error that crossed a process or a database as (kind, message), a DiskFull with its ``needed_bytes``.

    Raises KeyError for a kind that does not exist.
    """
    cls = _BY_KIND[kind]
    return DiskFull(message, needed_bytes) if cls is DiskFull else cls(message)


def one_line(error: BaseException) -> str:
    """An error that is not ours, with its type, fit for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"

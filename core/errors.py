"""All errors that qbatch raises on purpose. Each class says when it is raised and what the user can do about it.

``retry_policy`` decides what happens to a job after a JobError.

QbatchError
├── UsageError                      the request is invalid: exit code 2
│   └── ModelsRefused               models of the list cannot be used
├── ServiceUnreachable              a service that the command needs does not work: exit code 3
│   ├── BrokerUnreachable
│   ├── DatabaseUnreachable
│   │   ├── DatabaseRefused         it answered with an error
│   │   └── WrongDatabase           it cannot be used, and waiting does not help
│   │       ├── ForeignSchema
│   │       ├── DatabaseOfAnotherHost
│   │       └── DatabaseReplaced    exit code 5
│   ├── StorageUnavailable
│   ├── StackNotRunning
│   └── NoSuchDevice
├── WaitTimeout                     the time given with --timeout ran out: exit code 4
├── ForkserverKilled                a worker could not start its first runner: exit code 1, and the worker is restarted
└── JobError                        a job failed; ``kind`` is its name in rows and messages
    ├── DeviceError
    │   └── ModelFault              the model caused the fault, not the device
    ├── Unsupported
    │   └── WorkerLacks             of what the worker has installed, not of the model
    └── CudaOom, HostOom, WorkerLost, StorageError, FetchError, JobTimeout, SourceChanged, DiskFull, SourceNotFound,
        SourceGated, SourceCorrupt, UnsafeSource, QuantizationError, BenchmarkError, InternalError, BoundNotKept
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from qbatch.core.control_characters import escape_controls

# Enough for a list of mistakes; of a file that is no list at all, the first ones tell.
_SHOWN_PROBLEMS = 100


class QbatchError(Exception):
    """The base class of all errors. ``str(error)`` is one line without control characters, fit for a terminal."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return escape_controls(super().__str__())

    @property
    def lines(self) -> tuple[str, ...]:
        """How the command line shows it."""
        return (str(self),)


class UsageError(QbatchError):
    """A command or setting is malformed, or asks for something impossible. The message says what is wrong with it:
    correct it and run the command again."""

    exit_code = 2


class ModelsRefused(UsageError):
    """Models of a list cannot be used, each for a reason that is known before anything is stored. Correct or remove
    those lines; with --keep-going the others are submitted."""

    def __init__(self, problems: Sequence[str], *, models: int, is_plan: bool = False) -> None:
        """``is_plan``: nobody asked to submit them yet."""
        self._so = "so submit would refuse this list" if is_plan else "so nothing was submitted"
        more = len(problems) - _SHOWN_PROBLEMS
        self._problems = (*problems[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else ()))
        self._count, self._models = len(problems), models
        super().__init__("; ".join(self._problems))

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each problem."""
        if self._count == 1:
            return (str(self),)
        first = f"{self._count} of {self._models} models cannot be used, {self._so}:"
        return (first, *(f"  {escape_controls(problem)}" for problem in self._problems))


class ServiceUnreachable(QbatchError):
    """A service that the command needs does not work. Start or repair the service that the message names; `qbatch
    doctor` checks all of them."""

    exit_code = 3


class BrokerUnreachable(ServiceUnreachable):
    """Redis does not answer, or did not start. Check QBATCH_BROKER_URL and the Redis server. Jobs stay in the database,
    and the scheduler sends them when Redis is back."""


class DatabaseUnreachable(ServiceUnreachable):
    """The database cannot be reached, read or written. Check QBATCH_DATABASE_URL and the database server. Workers keep
    their results on disk meanwhile, and record them later."""


class DatabaseRefused(DatabaseUnreachable):
    """The database answered, but refused a statement, for example because of a constraint or a missing permission. The
    message quotes its reason. Waiting does not help."""


class WrongDatabase(DatabaseUnreachable):
    """The database answers, but this process cannot use it. The process stops instead of waiting."""


class ForeignSchema(WrongDatabase):
    """The schema of the database is that of a newer qbatch that this version cannot work with, or it was changed by
    hand. Update qbatch on this machine, or restore the schema."""


class DatabaseOfAnotherHost(WrongDatabase):
    """The SQLite file is on a network file system, and another host is using it. Use qbatch on that host, stop it
    there, or move to PostgreSQL."""


class DatabaseReplaced(WrongDatabase):
    """The database was deleted or replaced while qbatch was using it. Stop all processes that use it, restore it if you
    need it, and start them again. A process that ends with this error is not restarted automatically, because it would
    create an empty database."""

    exit_code = 5


class StorageUnavailable(ServiceUnreachable):
    """A folder that qbatch needs cannot be created or written, or its file system lacks an operation that qbatch needs.
    Correct its permissions, or choose another folder with QBATCH_HOME, QBATCH_STORAGE or QBATCH_CACHE."""


class StackNotRunning(ServiceUnreachable):
    """Nothing that could run the jobs is running, or the stack could not be started. Start it with `qbatch up`, or see
    the logs in the home."""


class NoSuchDevice(ServiceUnreachable):
    """The machine does not have the requested GPU, or its runners cannot use it. Choose another one with ``--gpus``, or
    use ``--cpu``."""


class WaitTimeout(QbatchError):
    """The time given with --timeout ran out before all jobs had finished. The jobs continue; wait again."""

    exit_code = 4


class ForkserverKilled(QbatchError):
    """The processes from which runners are started were killed while they imported what runners need, for example by
    the kernel because memory ran out. The worker ends and is restarted after a while; the kernel's log says why."""


class JobError(QbatchError):
    """The base class of the errors with which a job fails. `qbatch show JOB` has the message, and `qbatch retry JOB`
    queues the job again.

    ``may_pass``: whether the cause is known to be the worker's machine, its storage or what is installed on it. Another
    worker, or the same one later, may then do what failed. It is not sent or stored with the error.
    """

    kind: ClassVar[str] = "internal_error"
    may_pass = False


class CudaOom(JobError):
    """The GPU does not have enough memory for the job. qbatch tries the job on a larger GPU; if there is none, start a
    worker on one, or submit with a smaller batch size or fewer prompt tokens."""

    kind = "cuda_oom"


class HostOom(JobError):
    """The runner was killed with SIGKILL, most often because the machine ran out of memory. Free memory, raise the
    container's memory limit, or use a machine with more of it."""

    kind = "host_oom"


class WorkerLost(JobError):
    """The worker or its runner ended without an error message, or the worker was silent for longer than its lease. Look
    into the job's log and the worker's log for the cause."""

    kind = "worker_lost"


class StorageError(JobError):
    """Reading or writing the shared storage failed while a job was running. Check the disk or mount that the message
    names."""

    kind = "storage_error"


class FetchError(JobError):
    """The source could not be fetched, usually because the hub was not reachable. It is tried again; check the network
    if it happens repeatedly."""

    kind = "fetch_error"


class DeviceError(JobError):
    """The GPU reported a fault other than a lack of memory. qbatch tries the job elsewhere, and stops using the GPU
    after several faults in a row: reset the GPU, then restart its worker."""

    kind = "device_error"
    may_pass = True


class JobTimeout(JobError):
    """The job ran longer than its time limit. Submit it with a longer ``--time-limit`` if it is not stuck."""

    kind = "timeout"


class SourceChanged(JobError):
    """Files of the source, or of a checkpoint, changed while a job used them. Leave them unchanged until the batch has
    finished, then retry."""

    kind = "source_changed"


class DiskFull(JobError):
    """The storage, or the disk of the source cache, does not have enough free space. Free some: the job then continues.
    A job fails if the disk fills up in the middle of its work several times in a row.

    ``needed_bytes``: how much space is needed, if it was known before the writing began.
    """

    kind = "disk_full"

    def __init__(self, message: str, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class SourceNotFound(JobError):
    """The folder, or the model or revision on the hub, does not exist or has no model in it. Correct the list of
    models."""

    kind = "source_not_found"


class SourceGated(JobError):
    """The hub requires a login or an accepted licence. Accept the licence on the model's page, and give the worker a
    token with HF_TOKEN."""

    kind = "source_gated"


class SourceCorrupt(JobError):
    """The source's files contradict each other, or a part that the model needs is missing. Download or create the model
    again."""

    kind = "source_corrupt"


class UnsafeSource(JobError):
    """The source contains pickled weights or code of its own, or lies outside the allowed folders. If you trust it,
    allow it with ``--allow-pickle``, QBATCH_TRUST_REMOTE_CODE or QBATCH_MODEL_ROOTS."""

    kind = "unsafe_source"


class Unsupported(JobError):
    """qbatch cannot quantize or measure such a model as requested. The message says what is not supported; another
    scheme may work."""

    kind = "unsupported"


class WorkerLacks(Unsupported):
    """What the job needs is not installed on the worker, or in another version. The message says what to install.

    The job stores it as an Unsupported.
    """

    may_pass = True


class QuantizationError(JobError):
    """Quantizing failed for a reason that has no error kind of its own. The traceback is in the job's log."""

    kind = "quantization_error"


class BenchmarkError(JobError):
    """A baseline could not be measured. The message says why. A published checkpoint that cannot be measured is a
    success of its quantization, and its row says why it has no figures."""

    kind = "benchmark_error"


class BoundNotKept(JobError):
    """No mixture of a search keeps to its bound. The message names the nearest one, which is published: use it, or
    submit with a looser bound. What the search found answers that without another search."""

    kind = "bound_not_kept"


class ModelFault(DeviceError):
    """The model itself made the GPU fail, for example with an index that its embedding table does not have. The process
    cannot use the GPU any more, but neither the device nor another job is to blame. Correct the model.

    The job stores it as a BenchmarkError.
    """

    kind = BenchmarkError.kind
    may_pass = False


class InternalError(JobError):
    """qbatch has a defect. The traceback is in the job's log: please report it."""

    kind = "internal_error"


# ModelFault and WorkerLacks have no kinds of their own.
_BY_KIND: dict[str, type[JobError]] = {cls.kind: cls for cls in JobError.__subclasses__()}

ERROR_KINDS: tuple[str, ...] = tuple(_BY_KIND)


OUR_DEFECTS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)
"""Exceptions that only a programming error raises. They are never reported as a fault of the hub, a file or a model."""


def job_error(kind: str, message: str, needed_bytes: int | None = None) -> JobError:
    """Create an error again that was sent or stored as (kind, message), and for DiskFull also ``needed_bytes``.

    Raises KeyError for an unknown kind.
    """
    cls = _BY_KIND[kind]
    return DiskFull(message, needed_bytes) if cls is DiskFull else cls(message)


def one_line(error: BaseException) -> str:
    """An exception of another library as one line: its type and the first line of its message, with the next one if the
    first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return f"{type(error).__name__}: {' '.join(said) or 'no message'}"

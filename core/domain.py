"""The values that describe a job: frozen dataclasses used by every package. Standard library only."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind as DeviceKind
from qbatch.core.kinds import DType as DType
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.methods.description import MethodOption, OptionValue, T
from qbatch.core.methods.registry import Description
from qbatch.core.methods.registry import Method as Method
from qbatch.core.recovery import Recovery
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


def content_hash(value: Mapping[str, Any]) -> str:
    """sha256 (hex) of a mapping's canonical JSON. The order of keys does not matter."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def stored_dtype(requested: DType, source: DType) -> DType:
    """The dtype of unquantized weights. AUTO keeps that of a 16-bit source and makes an fp32 source bfloat16."""
    if requested is not DType.AUTO:
        return requested
    return DType.BFLOAT16 if source in (DType.FLOAT32, DType.AUTO) else source


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to store a model's weights. Every field is part of the checkpoint's identity.

    ``skip_modules`` is added to the modules that transformers leaves out by default. ``max_shard_bytes`` None means
    transformers' own default. ``own`` are the options of the method, as pairs of name and value; those left out are at
    their defaults. ``Scheme.of`` takes both kinds by name. With ``recovery`` it is a checkpoint of the scheme without,
    its base, and an adapter beside it.
    """

    method: Method
    compute_dtype: DType = DType.AUTO
    skip_modules: tuple[str, ...] = ()
    max_shard_bytes: int | None = None
    own: tuple[tuple[str, OptionValue], ...] = ()
    recovery: Recovery | None = None

    def __post_init__(self) -> None:
        stored = {option.name: option for option in self.description.stored_options}
        given = dict(self.own)
        if unknown := sorted(given.keys() - stored.keys()):
            raise UsageError(f"{self.method} has no option {unknown[0]}")
        values = {name: given.get(name, option.default) for name, option in stored.items()}
        for name, option in stored.items():
            option.check(values[name])
        self.description.check(values)
        if self.max_shard_bytes is not None and self.max_shard_bytes <= 0:
            raise UsageError(f"the shard size must be at least one byte, not {self.max_shard_bytes}")
        if self.recovery is not None and not self.description.is_recoverable:
            raise UsageError(
                f"nothing can be recovered for {self.method}; only bitsandbytes' 4-bit methods have adapters"
            )
        object.__setattr__(self, "own", tuple(sorted(values.items())))

    @classmethod
    def of(cls, method: Method, **options: Any) -> Self:
        """The scheme with those options, whether every method or this one alone has them."""
        common = {name: options.pop(name) for name in _COMMON_OPTIONS if name in options}
        return cls(method=method, own=tuple(options.items()), **common)

    @property
    def description(self) -> Description:
        return self.method.description

    @property
    def options(self) -> dict[str, OptionValue]:
        """Its method's own options by name."""
        return dict(self.own)

    def __getitem__(self, option: MethodOption[T]) -> T:
        return option.of(self.options)

    @property
    def is_baseline(self) -> bool:
        return self.method is Method.NONE

    @property
    def base(self) -> Self:
        """The scheme of the checkpoint itself, without an adapter."""
        return self if self.recovery is None else replace(self, recovery=None)

    def bits(self, dtype: DType) -> int:
        """Nominal bits of a weight: its method's, or for a baseline those of ``dtype`` (16 or 32)."""
        if self.description.bits is not None:
            return self.description.bits
        return 32 if dtype is DType.FLOAT32 else 16

    def resolved(self, dtype: DType) -> Self:
        """The same scheme with a definite ``compute_dtype``: AUTO becomes ``dtype``, the stored dtype."""
        if self.compute_dtype is not DType.AUTO:
            return self
        return replace(self, compute_dtype=dtype)

    def to_json(self) -> dict[str, Any]:
        """Omits the recovery where there is none, so that the keys of stored checkpoints stay as they are."""
        return {
            "method": self.method,
            "compute_dtype": self.compute_dtype,
            "skip_modules": list(self.skip_modules),
            "max_shard_bytes": self.max_shard_bytes,
            **self.options,
            **({} if self.recovery is None else {"recovery": self.recovery.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        recovery = value.get("recovery")
        options = dict(value) | {
            "compute_dtype": DType(value["compute_dtype"]),
            "skip_modules": tuple(value["skip_modules"]),
            "recovery": None if recovery is None else Recovery.from_json(recovery),
        }
        return cls.of(Method(options.pop("method")), **options)


_COMMON_OPTIONS = ("compute_dtype", "skip_modules", "max_shard_bytes", "recovery")
BASELINE = Scheme(method=Method.NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRef:
    """A further text on which quality is measured, by the sha256 of its content. ``name``: what its figures bear."""

    name: str
    sha256: str


def _text_refs(values: Iterable[Mapping[str, Any]]) -> tuple[TextRef, ...]:
    return tuple(TextRef(**value) for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRef:
    """A task of lm-evaluation-harness: one of its registry, or a packed file identified by the sha256 of its text."""

    name: str
    sha256: str | None = None


def _task_refs(values: Iterable[Mapping[str, Any]]) -> tuple[TaskRef, ...]:
    return tuple(TaskRef(**value) for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Every parameter of a measurement. Numbers measured under different protocols are never compared.

    ``prompt_tokens`` is also the length of an encoder's input. The text is scored in windows of ``eval_window``
    tokens, ``eval_stride`` apart, at most ``eval_max_windows`` of them, and so are the ``more_texts``, on which quality
    alone is measured. ``num_fewshot`` None uses each task's own
    default; ``task_limit`` is the number of questions asked per task. Speed is measured in ``rounds``, alternating
    with the other models of the bundle. ``min_iterations`` and ``min_duration_s`` apply to all rounds together,
    ``warmup_iterations`` and ``prefill_iterations`` to each round. A warm-up generates ``warmup_tokens`` tokens, or
    ``new_tokens`` if that is None. ``prefill_iterations`` are prefills (of an encoder: passes) timed by themselves, in
    addition to the timed iterations. ``quality``, ``speed``, ``why`` and ``energy`` are the parts that are measured,
    the last two on a GPU by an analysis of decode steps; ``why`` explains ``speed``. Without any, nothing runs.
    ``tasks_version`` 2 stores how each question was answered, 1 did not.
    With ``share_speed``, a row may have the speed of another model of the same shape instead of being timed.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    warmup_iterations: int
    min_iterations: int
    min_duration_s: float
    eval_text_sha256: str
    eval_window: int
    eval_stride: int
    eval_max_windows: int
    tasks: tuple[TaskRef, ...] = ()
    num_fewshot: int | None = None
    task_limit: int | None = None
    rounds: int = 1
    why: bool = False
    energy: bool = False
    warmup_tokens: int | None = None
    prefill_iterations: int = 0
    quality: bool = True
    speed: bool = True
    share_speed: bool = False
    tasks_version: int = 1
    more_texts: tuple[TextRef, ...] = ()

    def __post_init__(self) -> None:
        for field in ("batch_size", "prompt_tokens", "min_iterations", "eval_window", "eval_stride", "rounds"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.new_tokens < 2:
            raise UsageError(
                f"new_tokens must be at least 2, not {self.new_tokens}: decoding is timed from the second token on"
            )
        if self.warmup_tokens is not None and self.warmup_tokens < 2:
            raise UsageError(f"warmup_tokens must be at least 2, not {self.warmup_tokens}: the second is decoded")
        if self.prefill_iterations < 0:
            raise UsageError(f"prefill_iterations must be at least 0, not {self.prefill_iterations}")
        if self.why and not self.speed:
            raise UsageError("what limits the speed cannot be found without measuring it")
        if self.tasks and not self.quality:
            raise UsageError("tasks are a part of quality, which is not measured")
        if self.more_texts and not self.quality:
            raise UsageError("further texts are a part of quality, which is not measured")

    @property
    def parts(self) -> frozenset[MeasuredPart]:
        chosen = {
            MeasuredPart.QUALITY: self.quality,
            MeasuredPart.SPEED: self.speed,
            MeasuredPart.WHY: self.why,
            MeasuredPart.ENERGY: self.energy,
        }
        return frozenset({MeasuredPart.SIZE, *(part for part, is_measured in chosen.items() if is_measured)})

    @property
    def runs_model(self) -> bool:
        """Whether the model is loaded at all. Its size is counted without."""
        return self.parts != {MeasuredPart.SIZE}

    def on_text(self, text: TextRef) -> Self:
        """The same with one of ``more_texts`` as the only text."""
        return replace(self, eval_text_sha256=text.sha256, more_texts=())

    @property
    def speed_rounds(self) -> int:
        return self.rounds if self.speed else 0

    @property
    def hash(self) -> str:
        return content_hash(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Omits fields with default values, so that adding a field does not change the hash of stored protocols."""
        value = asdict(self)
        return {f.name: value[f.name] for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**_with_refs(value))


def _with_refs(value: Mapping[str, Any]) -> dict[str, Any]:
    tasks, texts = _task_refs(value.get("tasks", ())), _text_refs(value.get("more_texts", ()))
    return dict(value) | {"tasks": tasks, "more_texts": texts}


# One generation gives a time for each token after the first, and the steps of one call are alike. So what counts is the
# number of rounds: with three, an error can be taken between them.
_SPEED_DEFAULTS: dict[DeviceKind, dict[str, Any]] = {
    DeviceKind.CUDA: {
        "batch_size": 1,
        "prompt_tokens": 256,
        "new_tokens": 64,
        "warmup_iterations": 1,
        "warmup_tokens": 5,
        "prefill_iterations": 4,
        "min_iterations": 3,
        "min_duration_s": 0.0,
        "rounds": 3,
        "why": True,
        "eval_window": 1024,
        "eval_stride": 1024,
        "eval_max_windows": 32,
    },
    # A CPU decodes a model of a billion parameters at about one token per second, so everything is shorter.
    DeviceKind.CPU: {
        "batch_size": 1,
        "prompt_tokens": 64,
        "new_tokens": 16,
        "warmup_iterations": 1,
        "warmup_tokens": 2,
        "min_iterations": 3,
        "min_duration_s": 0.3,
        "rounds": 3,
        "eval_window": 256,
        "eval_stride": 256,
        "eval_max_windows": 8,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolOptions:
    """The part of the protocol that a user chose. None means the default for the device on which the job runs."""

    eval_text_sha256: str
    batch_size: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    tasks: tuple[TaskRef, ...] = ()
    num_fewshot: int | None = None
    task_limit: int | None = None
    why: bool | None = None
    energy: bool | None = None
    quality: bool | None = None
    speed: bool | None = None
    share_speed: bool | None = None
    more_texts: tuple[TextRef, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tasks and (self.num_fewshot is not None or self.task_limit is not None):
            raise UsageError("--num-fewshot and --task-limit need --tasks")

    @property
    def text_hashes(self) -> tuple[str, ...]:
        """The sha256 of each stored text that the measurement needs: the evaluation texts and the packed tasks."""
        texts = (text.sha256 for text in self.more_texts or ())
        return (self.eval_text_sha256, *texts, *(task.sha256 for task in self.tasks if task.sha256 is not None))

    def for_device(self, kind: DeviceKind) -> Protocol:
        """The protocol on a device of ``kind`` (CUDA or CPU)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if kind is DeviceKind.CPU:
            # On a CPU there is nothing to analyse and no energy counter, and each model is timed. The request must not
            # change the protocol.
            values |= {"why": False, "energy": False, "share_speed": False}
        if self.tasks:
            values["tasks_version"] = _TASKS_VERSION
        return Protocol(**_SPEED_DEFAULTS[kind] | {name: value for name, value in values.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """Omits what newer options choose where they were not given: 0.1.0 does not know them."""
        value = asdict(self)
        return {name: chosen for name, chosen in value.items() if name not in _NEW_OPTIONS or chosen is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**_with_refs(value) | ({} if value.get("more_texts") else {"more_texts": None}))


# Rises whenever more, or something else, is stored of a task, so that an older result does not answer a new job.
_TASKS_VERSION = 2
_NEW_OPTIONS = ("quality", "speed", "share_speed", "more_texts")


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
        """That of the largest model that the job has loaded: a search measures mixtures of the unquantized one."""
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


def format_batch_id(number: int) -> str:
    return f"b{number}"


def format_job_id(number: int) -> str:
    return f"j{number}"


_TYPED_ID = re.compile(r"([bj])([1-9][0-9]{0,9})")
LARGEST_ID = 2**31 - 1
"""The largest id that a database column holds."""


LATEST = "latest"
"""What people call the batch that was submitted last."""


def find_id(text: str) -> tuple[str, int] | None:
    """``b12`` → ("b", 12), ``j345`` → ("j", 345); None for anything else."""
    match = _TYPED_ID.fullmatch(text)
    if match is None or int(match[2]) > LARGEST_ID:
        return None
    return match[1], int(match[2])


def job_number(job_id: str) -> int:
    """``j345`` → 345: what ``format_job_id`` was given."""
    return int(job_id.removeprefix("j"))

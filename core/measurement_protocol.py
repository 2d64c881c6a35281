"""How a model is measured: every parameter that decides what its figures mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from qbatch.core.content_hash import content_hash
from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind
from qbatch.core.measured.measured_part import MeasuredPart


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
    ``new_tokens`` if that is None; with ``full_first_warmup``, the first of a shape in a process generates all
    ``new_tokens``. ``prefill_iterations`` are prefills (of an encoder: passes) timed by themselves, in
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
    full_first_warmup: bool = False

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
        "warmup_tokens": 2,
        "full_first_warmup": True,
        "prefill_iterations": 2,
        "min_iterations": 3,
        "min_duration_s": 0.0,
        "rounds": 3,
        "why": True,
        "share_speed": True,
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
        chosen = {name: value for name, value in values.items() if value is not None}
        protocol = Protocol(**_SPEED_DEFAULTS[kind] | chosen)
        # Energy is measured of each model, together with its speed.
        return replace(protocol, share_speed=protocol.share_speed and protocol.speed and not protocol.energy)

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

"""What a method says of itself. A worker's half (``worker/methods``) does what is described here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind, DType

T = TypeVar("T", bool, int, float, str)
OptionValue = bool | int | float | str
Options = Mapping[str, OptionValue]
"""A scheme's own options by name, every one that its method stores."""


class StoredTensor(Protocol):
    """One tensor as a safetensors header has it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def _anything(_value: Any) -> None:
    return


def _nothing(_value: Any) -> str:
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOption(Generic[T]):
    """An option of one or several methods, as stored under ``name`` and given by ``flag``.

    ``choices`` are those that the command line offers, where it is one of few. ``check`` raises UsageError for what it
    cannot be. ``words`` is what is added to a row's name where the value is not the default. ``unasked`` refuses the
    option where none of the methods asked for has it; without, it is then ignored.
    """

    name: str
    flag: str
    help: str
    default: T
    choices: tuple[T, ...] = ()
    check: Callable[[T], None] = _anything
    words: Callable[[T], str] = _nothing
    unasked: str | None = None

    def of(self, options: Options) -> T:
        """Its value among ``options``; the default where they are of a row from before it existed."""
        value: Any = options.get(self.name, self.default)
        return value  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodDescription:
    """A method's torch-free half. As it stands it describes a method of which nothing but the name is known, such as a
    newer version's."""

    name: str
    aliases: tuple[str, ...] = ()
    # A weight's nominal ones; None where they are those of the data type.
    bits: int | None = None
    # --bits N asks for it; among several of as many bits --quant-type tells which.
    meant_by_bits: bool = False
    quant_type: str | None = None
    # Those that mean something to it, and those that its rows store as well.
    options: tuple[MethodOption[Any], ...] = ()
    carried: tuple[MethodOption[Any], ...] = ()
    # The packages that it is made of, and the extra of qbatch that installs them (None: qbatch needs them anyway).
    # Their versions decide a checkpoint's bytes, with transformers' and those of ``also_decided_by``.
    libraries: tuple[str, ...] = ()
    extra: str | None = None
    also_decided_by: tuple[str, ...] = ()
    # What it works on and with. Without a compute dtype its layers compute in the type of their inputs.
    devices: frozenset[DeviceKind] = frozenset({DeviceKind.CUDA, DeviceKind.CPU})
    dtypes: frozenset[DType] = frozenset({DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32})
    takes_compute_dtype: bool = True
    # Loggers whose warnings say nothing of a job, and the beginnings of the variables that its libraries read.
    silenced: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    # Whose figure the memory footprint is.
    footprint: str = "transformers' own figure"

    # What it needs

    @property
    def stored_options(self) -> tuple[MethodOption[Any], ...]:
        return (*self.options, *self.carried)

    def check(self, options: Options) -> None:
        """Raises UsageError where valid values do not go together."""

    def refuse_device(self, kind: DeviceKind) -> None:
        """Raises UsageError where it does not work on devices of that kind."""
        if kind is not DeviceKind.AUTO and kind not in self.devices:
            only = " and ".join(sorted(device.value for device in self.devices))
            raise UsageError(f"{self.name} does not work on {kind}; use --device {only}")

    def refuse_dtype(self, dtype: DType) -> None:
        """Raises UsageError where it does not work with weights of that type."""
        if dtype is not DType.AUTO and dtype not in self.dtypes:
            only = " or ".join(sorted(known.value for known in self.dtypes))
            raise UsageError(f"{self.name} does not work with {dtype}; use --dtype {only}")

    # The memory it takes, from headers alone

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        """Bytes in memory of a quantized weight [rows, columns], with what is kept beside the codes."""
        raise NotImplementedError(f"{self.name} loads no quantized weights")

    def working_bytes(self, largest_weight: int, options: Options) -> int:
        """Bytes that quantizing or a forward takes for a moment, where the largest quantized weight has so many
        values."""
        return 0

    # What it is called

    def title(self, options: Options) -> str:
        """The name in tables, with what is part of it."""
        return self.name

    def unusual(self, options: Options) -> str:
        """Options that are not at their defaults, in words to put behind the name."""
        own = ((option, option.of(options)) for option in self.options)
        return "".join(option.words(value) for option, value in own if value != option.default)

    def audit_lines(self, audit: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        """What the audit of a checkpoint says beyond every method's, as titles and texts."""
        return ()

    def defects(self, audit: Mapping[str, Any]) -> Iterable[str]:
        """What the audit says that makes a checkpoint unfit to ship."""
        return ()

    def waits_because(self, options: Options) -> str | None:
        """Why a decode step waits for the host many times, and what to do; None where the method is not why."""
        return None

    def on_cpu(self, name: str, slow_layers: int) -> str | None:
        """A sentence on the CPU kernels that a row called ``name`` runs through; ``slow_layers`` take a slower one."""
        return None

    def on_cpu_briefly(self, slow_layers: int) -> str | None:
        """The same for a table's foot; None where there is nothing to say."""
        return None


class CheckpointFamily(Protocol):
    """How checkpoints of one library are read from outside: their config's settings and their headers."""

    quant_method: str

    def words(self, settings: Mapping[str, Any]) -> str:
        """What ``quantization_config`` says, in a few words."""

    def num_parameters(self, tensors: Collection[StoredTensor]) -> int | None:
        """The elements that the stored tensors stand for; None where headers do not tell."""

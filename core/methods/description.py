"""The description of a quantization method, without torch. ``worker/methods`` contains the implementations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind, DType

T = TypeVar("T", bool, int, float, str)
OptionValue = bool | int | float | str
Options = Mapping[str, OptionValue]
"""A scheme's options by name: all that its method stores."""

StoredParts = Mapping[str, tuple[str, tuple[int, ...]]]
"""The dtype, as a safetensors header names it, and the shape of tensors by name."""


class StoredTensor(Protocol):
    """One tensor as described in a safetensors header."""

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
    """An option of one or several methods. It is stored under ``name`` and given on the command line as ``flag``.

    ``choices`` are the allowed values, if there are only a few. ``check`` raises UsageError for an invalid value.
    ``name_suffix`` returns the text appended to a row's name if the value is not the default. ``error_if_unused`` is
    the error message if the option is given but none of the requested methods has it; None means that the option is
    then ignored.
    """

    name: str
    flag: str
    help: str
    default: T
    choices: tuple[T, ...] = ()
    check: Callable[[T], None] = _anything
    name_suffix: Callable[[T], str] = _nothing
    error_if_unused: str | None = None

    def of(self, options: Options) -> T:
        """The option's value in ``options``; the default if the row was written before the option existed."""
        value: Any = options.get(self.name, self.default)
        return value  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodDescription:
    """The description of a method, without torch. An instance of this class itself describes a method of which only the
    name is known, such as one of a newer version."""

    name: str
    aliases: tuple[str, ...] = ()
    # Nominal bits per weight; None if the data type determines them.
    bits: int | None = None
    # Whether --bits N selects this method. If several methods have N bits, --quant-type chooses among them.
    selected_by_bits: bool = False
    quant_type: str | None = None
    # The options that have an effect, and further options that its rows store.
    options: tuple[MethodOption[Any], ...] = ()
    inactive_options: tuple[MethodOption[Any], ...] = ()
    # The packages that implement it, and the extra of qbatch that installs them (None: qbatch always requires them).
    # A checkpoint's bytes depend on their versions, on that of transformers, and on those of ``also_depends_on``.
    libraries: tuple[str, ...] = ()
    extra: str | None = None
    also_depends_on: tuple[str, ...] = ()
    # The supported devices and dtypes. If it takes no compute dtype, its layers compute in the dtype of their inputs.
    devices: frozenset[DeviceKind] = frozenset({DeviceKind.CUDA, DeviceKind.CPU})
    dtypes: frozenset[DType] = frozenset({DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32})
    takes_compute_dtype: bool = True
    # Loggers whose warnings are irrelevant to a job, and the prefixes of environment variables that its libraries read.
    silenced: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    # Whether an adapter can be made that wins back a part of what quantizing took.
    is_recoverable: bool = False
    # Whether checkpoints are written tensor by tensor, in little memory however large the model is.
    is_streamed: bool = True
    # Whether ``stored_parts`` and ``stored_metadata`` were compared with files that the library wrote.
    is_layout_known: bool = True
    # How the memory footprint is determined, in words.
    footprint: str = "as transformers reports it"

    # Requirements

    @property
    def stored_options(self) -> tuple[MethodOption[Any], ...]:
        return (*self.options, *self.inactive_options)

    def check(self, options: Options) -> None:
        """Raise UsageError if options that are valid by themselves cannot be combined."""

    def refuse_device(self, kind: DeviceKind) -> None:
        """Raise UsageError if the method does not work on devices of this kind."""
        if kind is not DeviceKind.AUTO and kind not in self.devices:
            only = " and ".join(sorted(device.value for device in self.devices))
            raise UsageError(f"{self.name} does not work on {kind}; use --device {only}")

    def refuse_dtype(self, dtype: DType) -> None:
        """Raise UsageError if the method does not work with weights of this dtype."""
        if dtype is not DType.AUTO and dtype not in self.dtypes:
            only = " or ".join(sorted(known.value for known in self.dtypes))
            raise UsageError(f"{self.name} does not work with {dtype}; use --dtype {only}")

    # Memory use, computed from headers only

    def loaded_bytes(self, rows: int, columns: int, options: Options) -> float:
        """Bytes in memory of a quantized weight [rows, columns], including its scales."""
        raise NotImplementedError(f"{self.name} has no quantized weights")

    def working_bytes(self, largest_weight: int, options: Options) -> int:
        """Bytes that quantizing or a forward pass needs temporarily, if the largest quantized weight has
        ``largest_weight`` values."""
        return 0

    def stored_parts(self, name: str, rows: int, columns: int, options: Options, dtype: str) -> StoredParts | None:
        """The tensors that a checkpoint holds for the quantized weight ``name`` [rows, columns] of values in ``dtype``.

        None where the method's library leaves such a weight unquantized.
        """
        raise NotImplementedError(f"{self.name} has no quantized weights")

    def held_parts(self, parts: StoredParts) -> StoredParts:
        """The tensors that a loaded model holds of a quantized weight that is stored as ``parts``."""
        return parts

    def varying_bytes(self, options: Options) -> int:
        """By how many bytes the stored parts of a weight may differ from ``stored_parts``, because of its values."""
        return 0

    def stored_metadata(self, columns: Mapping[str, int | None], dtype: str) -> Mapping[str, str]:
        """What the files' metadata say besides the format. ``columns`` has every tensor by name: for a quantized weight
        its number of columns, else None."""
        return {}

    def speed_depends_on_values(self, options: Options) -> bool:
        """Whether two models of the same shape may differ in speed because of the values of their weights."""
        return False

    # Its checkpoints elsewhere

    def config_for_loaders(self, options: Options, compute_dtype: str) -> Mapping[str, Any] | None:
        """What a checkpoint's ``quantization_config`` says that loaders decide by, apart from the list of skipped
        layers. None if no serving engine's source was read for the method."""
        return None

    # Texts

    def title(self, options: Options) -> str:
        """The name in tables, including options that are part of it."""
        return self.name

    def nondefault_options(self, options: Options) -> str:
        """The options that differ from their defaults, as text to append to the name."""
        own = ((option, option.of(options)) for option in self.options)
        return "".join(option.name_suffix(value) for option, value in own if value != option.default)

    def audit_lines(self, audit: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        """Titles and texts for the method's own entries in a checkpoint's audit."""
        return ()

    def defects(self, audit: Mapping[str, Any]) -> Iterable[str]:
        """The faults in the audit because of which a checkpoint should not be used."""
        return ()

    def synchronization_cause(self, options: Options) -> str | None:
        """Why the method makes a decode step wait for the host many times, and what to do; None if it does not."""
        return None

    def cpu_remark(self, name: str) -> str | None:
        """A sentence on the CPU kernels of the row called ``name``, where no layer needs a slower one."""
        return None

    def cpu_warning(self, slow_layers: int) -> str | None:
        """What must be known of a row, ``slow_layers`` of which were measured on a CPU with a slower kernel than the
        library would choose. None if the method has no such kernel."""
        return None


class CheckpointFamily(Protocol):
    """Reads the checkpoints of one library from their config and headers, without loading them."""

    quant_method: str

    @property
    def packed_parts(self) -> tuple[str, ...]:
        """The suffixes that mark a layer as packed: a tensor is stored under its name and one of them."""

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Describe ``quantization_config`` in a few words."""

    def num_parameters(self, tensors: Collection[StoredTensor]) -> int | None:
        """The number of parameters that the stored tensors represent; None if headers do not show it."""

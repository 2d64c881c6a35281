"""All methods, one line each. The worker finds the implementation by the class of the description
(``worker/methods``)."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

from qbatch.core.errors import UsageError
from qbatch.core.methods import bnb, torchao, unquantized
from qbatch.core.methods.description import CheckpointFamily, MethodDescription, MethodOption

Description = unquantized.Unquantized | bnb.BnbFourBit | bnb.BnbInt8 | torchao.Torchao
"""The classes of descriptions. The set is closed, so that the type checker finds a ``match`` that misses one."""

FAMILIES: tuple[CheckpointFamily, ...] = (bnb.BnbCheckpoints(), torchao.TorchaoCheckpoints())


def _of(description: Description) -> Description:
    """``description``. Type checkers do not check what the members of an enumeration are made from; here they do."""
    return description


class Method(StrEnum):
    """A quantization method. The value is the name stored in rows."""

    _value_: str
    description: Description

    def __new__(cls, description: Description) -> Self:
        member = str.__new__(cls, description.name)
        member._value_ = description.name
        member.description = description
        return member

    NF4 = _of(bnb.NF4)
    FP4 = _of(bnb.FP4)
    INT8 = _of(bnb.INT8)
    TORCHAO_INT8_DYNAMIC = _of(torchao.INT8_DYNAMIC)
    TORCHAO_INT8 = _of(torchao.INT8)
    TORCHAO_INT4 = _of(torchao.INT4)
    NONE = _of(unquantized.NONE)


def find_method(text: str) -> Method:
    """The method with this name or alias. Raises UsageError if there is none."""
    for method in Method:
        if text in (method.description.name, *method.description.aliases):
            return method
    raise UsageError(f"{text[:60]!r} is not a known scheme; qbatch knows {', '.join(Method)}")


def describe_row(name: str) -> MethodDescription:
    """The description of a stored row's method. A method of newer code gets a description with only its name."""
    known = {method.value: method.description for method in Method}
    return known.get(name) or MethodDescription(name=name)


def selected_by_bits(bits: int) -> tuple[Method, ...]:
    """The methods that ``--bits`` may select, the default one first."""
    return tuple(m for m in Method if m.description.selected_by_bits and m.description.bits == bits)


def known_bits() -> tuple[int, ...]:
    """The values that ``--bits`` accepts."""
    return tuple(sorted({m.description.bits for m in Method if m.description.selected_by_bits and m.description.bits}))


def quant_types() -> dict[str, Method]:
    """The values that ``--quant-type`` accepts, with their methods."""
    return {m.description.quant_type: m for m in Method if m.description.quant_type is not None}


def every_option() -> tuple[MethodOption[Any], ...]:
    """The options of all methods, each once."""
    return tuple({option.name: option for method in Method for option in method.description.options}.values())


def every_library() -> tuple[str, ...]:
    """The packages that implement the methods."""
    return tuple(dict.fromkeys(library for method in Method for library in method.description.libraries))


def optional_libraries() -> dict[str, str]:
    """The optional libraries, each with the extra of qbatch that installs it."""
    return {
        library: method.description.extra
        for method in Method
        for library in method.description.libraries
        if method.description.extra is not None
    }


def every_silenced_logger() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for method in Method for name in method.description.silenced))


def every_environment_prefix() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for method in Method for name in method.description.environment))


def required_libraries() -> tuple[str, ...]:
    """The libraries that qbatch always requires."""
    return tuple(library for library in every_library() if library not in optional_libraries())


def missing_library(description: MethodDescription) -> str | None:
    """An error message if a library that the method needs is not installed here; else None."""
    for library in description.libraries:
        if not is_installed(library):
            wanted = "qbatch" if description.extra is None else f"qbatch[{description.extra}]"
            return f"{description.name} needs {library}, which is not installed here: pip install '{wanted}'"
    return None


def is_installed(library: str) -> bool:
    """Whether a package is installed, according to its metadata. Nothing of it is imported."""
    # Imported here, because it takes a tenth of the time of a short command.
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def family_of(quant_method: object) -> CheckpointFamily | None:
    """The family of checkpoints whose config has this ``quant_method``; None if no method here writes them."""
    return next((family for family in FAMILIES if family.quant_method == quant_method), None)

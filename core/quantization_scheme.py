"""How a model's weights are stored: a method with its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from qbatch.core.errors import UsageError
from qbatch.core.kinds import DType
from qbatch.core.methods.description import MethodOption, OptionValue, T
from qbatch.core.methods.registry import Description, Method
from qbatch.core.recovery import Recovery


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

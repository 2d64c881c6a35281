"""What quantizing took from a model is won back by an adapter beside its checkpoint, whose codes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Self

from qbatch.core.errors import UsageError

EXTRA, LIBRARY = "recover", "peft"
"""The extra of qbatch that installs the library which loads adapters."""

TEXT_WINDOW, TEXT_WINDOWS = 256, 32
"""How much of a text weights the factors: at most so many windows of so many tokens."""

STEP_WINDOWS = 4
"""Of a training, how many windows each step reads at most."""

DEFAULT_RANK, LARGEST_RANK = 8, 4096

ADAPTER_MARK = "+"
"""In the name of an adapter's folder, what follows the name of the checkpoint that it belongs to."""

# Rises when a change in this package changes the bytes of adapters.
_WRITER = "2"


def with_adapter_mark(name: str, adapter: str) -> str:
    """What a scheme or checkpoint ``name`` is called with that adapter."""
    return f"{name}{ADAPTER_MARK}{adapter}"


class RecoveryKind(StrEnum):
    """SVD: factors of what quantizing took from each weight. SVD_ACT: the same, weighted by what the layers read.
    QLORA: factors that begin as those of SVD_ACT, and are trained to give the outputs of the model at 16 bits."""

    SVD = "svd"
    SVD_ACT = "svd-act"
    QLORA = "qlora"

    @property
    def reads_text(self) -> bool:
        return self is not RecoveryKind.SVD

    @property
    def is_trained(self) -> bool:
        return self is RecoveryKind.QLORA


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Which adapter is made for a quantized model. Every field is part of the adapter's identity.

    ``text_sha256``: the text that weights the factors, of which the first ``windows`` pieces of ``window`` tokens are
    read; None where there is no text. It is also what they are trained on, all of it, for ``steps`` steps; ``seed``
    decides in which order.
    """

    kind: RecoveryKind
    rank: int
    text_sha256: str | None = None
    window: int | None = None
    windows: int | None = None
    steps: int | None = None
    seed: int | None = None
    writer: str = _WRITER

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK:
            raise UsageError(f"the rank of an adapter must be from 1 to {LARGEST_RANK}, not {self.rank}")
        if self.kind.is_trained and (self.steps is None or self.steps < 1):
            raise UsageError(f"{self.kind} is trained, and needs at least one step")

    @property
    def slug(self) -> str:
        """A short name, for lists and paths."""
        return f"{self.kind}-r{self.rank}" + ("" if self.steps is None else f"-s{self.steps}")

    @classmethod
    def of(cls, kind: RecoveryKind, rank: int, text_sha256: str, steps: int | None = None) -> Self:
        """``text_sha256`` is used only if the kind reads a text, ``steps`` if it is trained."""
        if not kind.reads_text:
            return cls(kind=kind, rank=rank)
        read = cls(
            kind=RecoveryKind.SVD_ACT, rank=rank, text_sha256=text_sha256, window=TEXT_WINDOW, windows=TEXT_WINDOWS
        )
        return replace(read, kind=kind, steps=steps, seed=0) if kind.is_trained else read

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def find(cls, stored: Mapping[str, Any]) -> Self | None:
        """The recovery of a stored row; None if only newer code knows such."""
        known = {field.name for field in fields(cls)}
        return cls.from_json(stored) if stored.get("kind") in [*RecoveryKind] and stored.keys() <= known else None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**dict(value) | {"kind": RecoveryKind(value["kind"])})

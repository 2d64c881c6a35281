"""What quantizing took from a model is won back by an adapter beside its checkpoint, whose codes stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from qbatch.core.errors import UsageError

EXTRA, LIBRARY = "recover", "peft"
"""The extra of qbatch that installs the library which loads adapters."""

LARGEST_RANK = 4096

# Rises when a change in this package changes the bytes of adapters.
_WRITER = "1"


class RecoveryKind(StrEnum):
    """SVD: factors of what quantizing took from each weight. SVD_ACT: the same, weighted by what the layers read."""

    SVD = "svd"
    SVD_ACT = "svd-act"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Which adapter is made for a quantized model. Every field is part of the adapter's identity.

    ``text_sha256``: the text that weights the factors, of which the first ``windows`` pieces of ``window`` tokens are
    read; None where there is no text.
    """

    kind: RecoveryKind
    rank: int
    text_sha256: str | None = None
    window: int | None = None
    windows: int | None = None
    writer: str = _WRITER

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= LARGEST_RANK:
            raise UsageError(f"the rank of an adapter must be from 1 to {LARGEST_RANK}, not {self.rank}")

    @property
    def title(self) -> str:
        return f"{self.kind} rank {self.rank}"

    @property
    def slug(self) -> str:
        """The title as a part of a path."""
        return f"{self.kind}-r{self.rank}"

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**dict(value) | {"kind": RecoveryKind(value["kind"])})

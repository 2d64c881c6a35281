"""What a mixture must keep to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from qbatch.core.errors import UsageError

if TYPE_CHECKING:
    from qbatch.core.search.frontier import FrontierPoint
    from qbatch.core.search.sensitivity import Estimate

AUTO = "auto"
"""The scheme whose layers at 16 bits a search chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a mixture must keep to: exactly one of the three."""

    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    max_weights_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise UsageError("--scheme auto needs exactly one of --max-kl, --max-ppl-ratio and --max-weights-bytes")
        if not 0 < getattr(self, given[0]) < math.inf:
            raise UsageError(f"{self.flag} must be a finite number above 0")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    @property
    def flag(self) -> str:
        """The option that gave it."""
        return f"--{next(iter(self.to_json())).replace('_', '-')}"

    @property
    def is_about_quality(self) -> bool:
        """Whether only a comparison with the baseline can tell if it is kept."""
        return self.max_weights_bytes is None

    def holds_for(self, *, kl: Estimate | None, ln_ppl_ratio: Estimate | None, weights_bytes: int) -> bool:
        """Whether it is met by these figures: bytes exactly, the others with two standard errors added."""
        if self.max_weights_bytes is not None:
            return weights_bytes <= self.max_weights_bytes
        if self.max_ppl_ratio is not None:
            return ln_ppl_ratio is not None and ln_ppl_ratio.upper <= math.log(self.max_ppl_ratio)
        return self.max_kl is not None and kl is not None and kl.upper <= self.max_kl

    def is_predicted_by(self, point: FrontierPoint) -> bool:
        return self.holds_for(kl=point.kl, ln_ppl_ratio=point.ln_ppl_ratio, weights_bytes=point.weights_bytes)

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"a KL of at most {self.max_kl:g}"
        if self.max_ppl_ratio is not None:
            return f"a perplexity ratio of at most {self.max_ppl_ratio:g}"
        return f"at most {self.max_weights_bytes:,} bytes of weights"

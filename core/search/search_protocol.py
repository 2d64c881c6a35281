"""What decides how a search measures: everything that its figures depend on besides the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from qbatch.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProtocol:
    """The search's own text, by its hash, is read in ``windows`` pieces of at most ``window`` tokens.

    ``passes_per_group``: measuring single groups may cost this many passes through the whole model for each group, what
    the derivatives cost included; at least as many as ``least_passes`` are always allowed. ``refined_each``: after how
    many groups that were added the derivatives are found again. ``most_tries``: without derivatives, how many groups
    are measured at most before one is added to a mixture.
    """

    text_sha256: str
    window: int = 256
    windows: int = 16
    passes_per_group: float = 0.1
    least_passes: float = 5.5
    most_tries: int = 3
    refined_each: int = 4

    def __post_init__(self) -> None:
        for field in ("window", "windows", "most_tries", "refined_each"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} must be at least 1, not {getattr(self, field)}")

    def to_json(self) -> dict[str, Any]:
        """Omits fields with default values, so that adding a field does not change the keys of stored searches."""
        value = asdict(self)
        return {each.name: value[each.name] for each in fields(self) if getattr(self, each.name) != each.default}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**value)

    def passes_allowed(self, groups: int) -> float:
        """How many passes the sensitivities of this many groups may cost."""
        return max(self.least_passes, self.passes_per_group * groups)

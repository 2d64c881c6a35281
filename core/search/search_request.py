"""What a job asks for that looks for the layers to keep at 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qbatch.core.search.bound import Bound
from qbatch.core.search.search_protocol import SearchProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """The bound is no part of what is measured: one search answers every bound."""

    bound: Bound
    protocol: SearchProtocol

    def to_json(self) -> dict[str, Any]:
        return {"bound": self.bound.to_json(), "protocol": self.protocol.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(bound=Bound.from_json(value["bound"]), protocol=SearchProtocol.from_json(value["protocol"]))

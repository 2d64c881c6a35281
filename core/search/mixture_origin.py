"""How a job has to do with a search for the layers to keep at 16 bits, and what it is called for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbatch.core.search.bound import AUTO
from qbatch.core.stored_json import Stored, omitted_if_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOrigin(Stored):
    """``bound``: of a search, what it must keep to. ``job_id`` and ``point``: of a job that publishes a mixture, the
    search that it is for, and which point of its frontier. Nothing of any other job."""

    bound: Mapping[str, Any] | None = omitted_if_unknown()
    job_id: str | None = omitted_if_unknown()
    point: int | None = omitted_if_unknown()

    @property
    def title(self) -> str:
        """What follows the name of the method: `` auto``, `` mixture 3 of j7``, or nothing."""
        if self.bound is not None:
            return f" {AUTO}"
        if self.point is None:
            return ""
        return f" mixture {self.point}" if self.job_id is None else f" mixture {self.point} of {self.job_id}"

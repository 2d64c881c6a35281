"""What a search found: stored once, and read for every bound."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.search.frontier import Frontier
from qbatch.core.search.sensitivity import Sensitivity
from qbatch.core.stored_json import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSearch(Stored):
    """``parameters``: of the whole model. ``seconds``: how long it kept the device busy. ``device_name``: which one."""

    sensitivity: Sensitivity
    frontier: Frontier
    parameters: int
    seconds: float
    device_name: str

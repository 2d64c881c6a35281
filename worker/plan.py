"""The jobs of a bundle once their source is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models_db.domain import Claim
from models_db.identity import Settled
from worker.checkpoint import Published, checkpoint_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A claim whose source is known."""

    claim: Claim
    settled: Settled

    @property
    def job_id(self) -> int:
        return self.claim.job_id

    @property
    def path(self) -> str:
        return checkpoint_path(self.claim.spec.source.name, self.settled.scheme, self.settled.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is loaded and measured: a published checkpoint, or for a baseline (``published`` None) the source in
    ``folder``. Its jobs differ in their protocol's shape alone."""

    plans: tuple[Plan, ...]
    folder: Path
    published: Published | None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(plan.job_id for plan in self.plans)


def by_key(plans: Iterable[Plan]) -> dict[str, tuple[Plan, ...]]:
    """Plans of one checkpoint key, in the order in which the keys come."""
    found: dict[str, list[Plan]] = {}
    for plan in plans:
        found.setdefault(plan.settled.key, []).append(plan)
    return {key: tuple(members) for key, members in found.items()}

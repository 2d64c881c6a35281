"""The jobs of a bundle once their source is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qbatch.core.domain import Claim, DeviceKind, DType
from qbatch.core.identity import Settled, settle
from qbatch.worker.checkpoints.publish import Published, Verified, checkpoint_path
from qbatch.worker.runner.messages import JobIdentity
from qbatch.worker.sources.fetch import LocalSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A claim whose source is known."""

    claim: Claim
    settled: Settled
    legacy_key: str | None

    @property
    def job_id(self) -> int:
        return self.claim.job_id

    @property
    def identity(self) -> JobIdentity:
        return JobIdentity(key=self.settled.key, legacy_key=self.legacy_key, protocol_hash=self.settled.protocol.hash)

    @property
    def path(self) -> str:
        return checkpoint_path(self.claim.spec.source.name, self.settled.scheme, self.settled.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What is loaded and measured: a published checkpoint, or for a baseline (``verified`` None) the source in
    ``folder``. Its jobs differ in their protocol's shape alone."""

    plans: tuple[Plan, ...]
    folder: Path
    verified: Verified | None

    @property
    def published(self) -> Published | None:
        return self.verified.published if self.verified is not None else None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(plan.job_id for plan in self.plans)


def plan_job(claim: Claim, source: LocalSource, dtype: DType, device_kind: DeviceKind) -> Plan:
    """``dtype`` is the source's."""

    def settled(fingerprint: str) -> Settled:
        return settle(claim.spec, fingerprint=fingerprint, source=dtype, device_kind=device_kind)

    legacy = source.legacy_fingerprint
    return Plan(
        claim=claim,
        settled=settled(source.fingerprint),
        legacy_key=settled(legacy).key if legacy is not None else None,
    )


def by_key(plans: Iterable[Plan]) -> dict[str, tuple[Plan, ...]]:
    """Plans of one checkpoint key, in the order in which the keys come."""
    found: dict[str, list[Plan]] = {}
    for plan in plans:
        found.setdefault(plan.settled.key, []).append(plan)
    return {key: tuple(members) for key, members in found.items()}

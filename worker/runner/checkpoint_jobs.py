"""The jobs of a bundle after their source has been identified, grouped by checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qbatch.core.domain import Claim, DeviceKind, DType
from qbatch.core.identity import Settled, settle, settle_base
from qbatch.worker.checkpoints.published import Published, Verified, checkpoint_path
from qbatch.worker.runner.messages import JobIdentity
from qbatch.worker.sources.fetch import LocalSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A claimed job whose source has been identified."""

    claim: Claim
    settled: Settled
    legacy_key: str | None
    spelled_keys: Mapping[str, str] = field(default_factory=dict)
    speed_key: str | None = None

    @property
    def job_id(self) -> int:
        return self.claim.job_id

    @property
    def searches(self) -> bool:
        """Whether the job looks for layers to keep at 16 bits, instead of making a checkpoint."""
        return self.claim.spec.search is not None

    @property
    def identity(self) -> JobIdentity:
        return JobIdentity(
            key=self.settled.key,
            legacy_key=self.legacy_key,
            protocol_hash=self.settled.protocol.hash,
            base_key=self.settled.base_key,
            spelled_keys=self.spelled_keys,
            speed_key=self.speed_key,
        )

    @property
    def base(self) -> Plan:
        """The plan of the checkpoint to which its adapter belongs; the plan itself if it has no adapter."""
        return replace(self, settled=settle_base(self.settled))

    @property
    def path(self) -> str:
        """The path of its published checkpoint. With an adapter, that of the checkpoint that the adapter is for."""
        base = settle_base(self.settled)
        return checkpoint_path(self.claim.spec.source.name, base.scheme, base.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """A model to load and measure: a published checkpoint, or, for a baseline, the source (then ``verified`` is None).

    With an adapter, ``verified`` is the adapter, and ``base`` the checkpoint in ``folder`` that it belongs to. Its jobs
    differ only in batch size and in the numbers of tokens.
    """

    plans: tuple[Plan, ...]
    folder: Path
    verified: Verified | None
    adapter: Path | None = None
    base: Verified | None = None

    @property
    def published(self) -> Published | None:
        return self.verified.published if self.verified is not None else None

    @property
    def audit(self) -> Mapping[str, Any] | None:
        """What is known of the checkpoint. With an adapter, also what is known of that; but not which loaders load it,
        since an adapter is for PEFT."""
        if self.verified is None:
            return None
        if self.base is None:
            return self.verified.published.audit
        of_base = {name: value for name, value in self.base.published.audit.items() if name != "loaders"}
        return of_base | dict(self.verified.published.audit)

    @property
    def runs(self) -> bool:
        """Whether a part of the measurement was requested for which the model must be loaded."""
        return self.plans[0].settled.protocol.runs_model

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(plan.job_id for plan in self.plans)


def plan_job(
    claim: Claim, source: LocalSource, dtype: DType, device_kind: DeviceKind, skip_list: tuple[str, ...] | None = None
) -> Plan:
    """Plan a claimed job. ``dtype`` is that of the source; ``skip_list`` is None where its scheme skips nothing."""

    def settled(fingerprint: str, listed: tuple[str, ...] | None = skip_list) -> Settled:
        return settle(claim.spec, fingerprint=fingerprint, source=dtype, device_kind=device_kind, skip_list=listed)

    legacy = source.legacy_fingerprint
    own = settled(source.fingerprint)
    return Plan(
        claim=claim,
        settled=own,
        legacy_key=settled(legacy).key if legacy is not None and claim.spec.search is None else None,
        spelled_keys=_spelled_keys(settled(source.fingerprint, None), own) if skip_list is not None else {},
    )


def _spelled_keys(spelled: Settled, own: Settled) -> Mapping[str, str]:
    """What the keys of a skip list as it is spelt stand for."""
    pairs = ((spelled.key, own.key), (spelled.base_key, own.base_key))
    return {before: after for before, after in pairs if before is not None and after is not None}


def by_key(plans: Iterable[Plan]) -> dict[str, tuple[Plan, ...]]:
    """Group plans by checkpoint key, in the order in which the keys first appear."""
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        groups.setdefault(plan.settled.key, []).append(plan)
    return {key: tuple(members) for key, members in groups.items()}

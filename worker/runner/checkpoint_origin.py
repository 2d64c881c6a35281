"""Where what a job publishes comes from, as its manifest says."""

from __future__ import annotations

from qbatch.worker.checkpoints.publish import Origin
from qbatch.worker.runner.checkpoint_jobs import Plan
from qbatch.worker.runner.messages import Order
from qbatch.worker.sources.fetch import LocalSource


def origin_of(plan: Plan, source: LocalSource, order: Order) -> Origin:
    from qbatch.worker.measuring.versions import versions

    settled = plan.settled
    return Origin(
        model=plan.claim.spec.source.name,
        revision=source.revision,
        fingerprint=source.fingerprint,
        scheme=settled.scheme,
        dtype=settled.dtype,
        device_kind=order.device_kind,
        device_name=order.device_name,
        database=order.database,
        versions={name: str(value) for name, value in versions(*settled.scheme.description.libraries).items()},
    )

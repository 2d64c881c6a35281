"""A bundle of jobs run in this process, without a queue, a database or a worker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qbatch.core.domain import Claim, DeviceKind, DType, JobSpec, Protocol, ProtocolOptions, Scheme, SourceRef, Stage
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.messages import (
    Answered,
    Entered,
    Failed,
    FilesKnown,
    FilesSeen,
    Measured,
    Order,
    Question,
    Reply,
    RunnerMessage,
)
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.sources.source_policy import SourcePolicy
from tests.unit.benchmark_models import QUICK, TEXT

TEXT_HASH = hashlib.sha256(TEXT.encode()).hexdigest()


@dataclass(slots=True)
class Ear:
    """A supervisor that only listens."""

    heard: list[RunnerMessage] = field(default_factory=list)

    def send(self, message: RunnerMessage) -> None:
        self.heard.append(message)

    def ask(self, question: Question) -> Reply:
        self.send(question)
        return FilesKnown(digests={}) if isinstance(question, FilesSeen) else Answered(job_ids=frozenset())

    def entered(self, stage: Stage) -> set[int]:
        return {job_id for m in self.heard if isinstance(m, Entered) and m.stage is stage for job_id in m.job_ids}

    def measured(self) -> set[int]:
        return {m.job_id for m in self.heard if isinstance(m, Measured)}

    def failed(self) -> dict[int, str]:
        return {m.job_id: m.kind for m in self.heard if isinstance(m, Failed)}

    def measurements(self) -> dict[int, Measurement]:
        return {m.job_id: m.measurement for m in self.heard if isinstance(m, Measured)}


def an_order(
    folder: Path,
    claims: Sequence[Claim],
    *,
    texts: Mapping[str, str] | None = None,
    device_name: str = "this CPU",
    device_uuid: str | None = None,
) -> Order:
    """The order to run ``claims`` on a CPU, with everything in ``folder``. ``texts``: further ones, by their sha256."""
    storage = folder / "storage"
    return Order(
        claims=tuple(claims),
        texts={TEXT_HASH: TEXT} | dict(texts or {}),
        device_kind=DeviceKind.CPU,
        device_name=device_name,
        storage=storage,
        staging=storage / ".staging",
        cache=folder / "cache",
        cache_bytes=1 << 30,
        policy=SourcePolicy(roots=None),
        lease_s=60.0,
        log_path=storage / "log",
        device_uuid=device_uuid,
    )


def run_bundle(
    source: Path,
    schemes: Mapping[int, Scheme],
    *,
    attempt: int = 1,
    protocol: ProtocolOptions | None = None,
    texts: Mapping[str, str] | None = None,
    ear: Ear | None = None,
) -> Ear:
    """Run a job for each of ``schemes``, by their ids, on a CPU. ``texts``: further ones, by their sha256. ``ear``: who
    listens."""
    claims = tuple(
        Claim(
            job_id=job_id,
            attempt=attempt,
            spec=JobSpec(
                source=SourceRef(name=str(source), location=str(source), is_folder=True),
                scheme=scheme,
                dtype=DType.AUTO,
                device=DeviceKind.CPU,
                protocol=protocol or ProtocolOptions(eval_text_sha256=TEXT_HASH),
            ),
        )
        for job_id, scheme in schemes.items()
    )
    order = an_order(source.parent, claims, texts=texts)
    ear = ear or Ear()
    Bundle(order, ear, TimingPauses()).run()
    return ear


def measure_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a job's options ask for, it is measured by the quick protocol."""

    def quick(_options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(QUICK, eval_text_sha256=TEXT_HASH)

    monkeypatch.setattr(ProtocolOptions, "for_device", quick)

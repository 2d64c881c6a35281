"""One bundle on one device: source → quantize every width → publish → verify → benchmark."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from models_db.domain import Claim, DeviceKind, Measurement, Stage
from models_db.errors import CudaOom, DeviceError, HostOom, InternalError, JobError, one_line
from models_db.identity import Settled, settle
from models_db.sources import read_headers, source_dtype
from worker.checkpoint import Origin, Published, checkpoint_path, find_published, publish
from worker.fetch import LocalSource, fetched
from worker.messages import (
    CheckpointReady,
    Entered,
    Failed,
    Measured,
    Order,
    Progressed,
    Resolved,
    RunnerMessage,
)
from worker.staging import stage, unstage

if TYPE_CHECKING:
    from worker.benchmark.reference import Reference
    from worker.load import Loaded

log = logging.getLogger("qbatch.runner")

_PROGRESS_INTERVAL_S = 0.3


class Link(Protocol):
    """How a bundle reports (see ``worker.runner``)."""

    def send(self, message: RunnerMessage) -> None: ...

    def ask(self, resolved: Resolved) -> frozenset[int]: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
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


class Bundle:
    """One bundle on one device: the jobs of one source."""

    def __init__(self, order: Order, link: Link) -> None:
        self._order = order
        self._link = link
        self._open = {claim.job_id for claim in order.claims}
        self._device = "cuda:0" if order.device_kind is DeviceKind.CUDA else "cpu"

    def run(self) -> None:
        """Every job of the bundle ends in a message, except after a fault that spoils the device for those left."""
        ids = tuple(sorted(self._open))
        self._enter(ids, Stage.FETCHING)
        with self._reports(ids), self._source() as source:
            self._work(source)

    @contextlib.contextmanager
    def _source(self) -> Iterator[LocalSource]:
        ids = tuple(sorted(self._open))
        progress = self._throttled(
            lambda done, total: Progressed(job_ids=ids, bytes_read=done, bytes_written=0, bytes_total=total)
        )
        with fetched(
            self._order.claims[0].spec.source,
            cache=self._order.cache,
            cache_bytes=self._order.cache_bytes,
            on_progress=progress,
        ) as source:
            yield source

    def _work(self, source: LocalSource) -> None:
        dtype = source_dtype(read_headers(source.folder))
        plans = [
            Plan(
                claim=claim,
                settled=settle(
                    claim.spec, fingerprint=source.fingerprint, source=dtype, device_kind=self._order.device_kind
                ),
            )
            for claim in self._order.claims
        ]
        answered = self._link.ask(
            Resolved(keys={plan.job_id: (plan.settled.key, plan.settled.protocol.hash) for plan in plans})
        )
        self._open -= answered
        published = self._publish_all(source, [plan for plan in plans if plan.job_id in self._open])
        for plan in plans:
            if plan.job_id in self._open:
                with self._reports((plan.job_id,)):
                    self._benchmark(plan, source, published.get(plan.job_id))
                _free_device_memory()

    def _publish_all(self, source: LocalSource, plans: list[Plan]) -> dict[int, Published]:
        """Every quantized plan's checkpoint, by job id: adopted where it is published, else written now."""
        published: dict[int, Published] = {}
        missing: list[Plan] = []
        for plan in plans:
            if plan.settled.scheme.is_baseline:
                continue
            with self._reports((plan.job_id,)):
                found = find_published(self._order.storage, plan.path, plan.settled.key)
                if found is None:
                    missing.append(plan)
                else:
                    log.info("j%s: %s is published already", plan.job_id, found.path)
                    published[plan.job_id] = found
        if missing:
            published |= self._quantize(source, missing)
        for job_id, checkpoint in published.items():
            self._link.send(CheckpointReady(job_id=job_id, published=checkpoint))
        return published

    def _quantize(self, source: LocalSource, plans: list[Plan]) -> dict[int, Published]:
        from worker.quantize import Refused, Target, write_checkpoints

        published: dict[int, Published] = {}
        ids = tuple(plan.job_id for plan in plans)
        self._enter(ids, Stage.QUANTIZING)
        progress = self._throttled(
            lambda read, written, total: Progressed(
                job_ids=ids, bytes_read=read, bytes_written=written, bytes_total=total
            )
        )
        with self._reports(ids):
            folders = {plan.job_id: self._stage(plan) for plan in plans}
            by_folder = {folders[plan.job_id]: plan for plan in plans}
            targets = [Target(scheme=plan.settled.scheme, folder=folders[plan.job_id]) for plan in plans]
            try:
                for outcome in write_checkpoints(
                    source.folder, targets, dtype=plans[0].settled.dtype, device=self._device, on_progress=progress
                ):
                    plan = by_folder[outcome.target.folder]
                    if isinstance(outcome, Refused):
                        self._failed(plan.job_id, outcome.error)
                        continue
                    with self._reports((plan.job_id,)):
                        self._enter((plan.job_id,), Stage.PUBLISHING)
                        published[plan.job_id] = publish(
                            outcome.target.folder,
                            storage=self._order.storage,
                            source=source.folder,
                            key=plan.settled.key,
                            origin=self._origin(plan, source),
                            files=outcome.files,
                            audit=dict(outcome.audit) | {"writer": outcome.writer},
                            quantize_s=outcome.quantize_s,
                        )
                    self._enter(tuple(sorted(set(ids) & self._open - published.keys())), Stage.QUANTIZING)
            finally:
                for folder in folders.values():
                    unstage(folder)
        _free_device_memory()
        return published

    def _stage(self, plan: Plan) -> Path:
        return stage(self._order.staging, plan.job_id, plan.claim.attempt)

    def _origin(self, plan: Plan, source: LocalSource) -> Origin:
        from worker.benchmark.versions import versions

        return Origin(
            model=plan.claim.spec.source.name,
            revision=source.revision,
            fingerprint=source.fingerprint,
            scheme=plan.settled.scheme,
            dtype=plan.settled.dtype,
            device_kind=self._order.device_kind,
            device_name=self._order.device_name,
            versions={name: str(value) for name, value in versions().items()},
        )

    def _benchmark(self, plan: Plan, source: LocalSource, published: Published | None) -> None:
        from worker.benchmark import benchmark
        from worker.load import load

        self._enter((plan.job_id,), Stage.LOADING)
        folder = source.folder if published is None else self._order.storage / published.path
        loaded = load(folder, dtype=plan.settled.dtype, device=self._device)
        self._enter((plan.job_id,), Stage.BENCHMARKING)
        measurement = benchmark(
            loaded,
            folder=folder,
            scheme=plan.settled.scheme,
            dtype=plan.settled.dtype,
            protocol=plan.settled.protocol,
            eval_text=self._eval_text(plan),
            on_step=lambda step: log.info("j%s: %s", plan.job_id, step),
            reference=None if plan.settled.scheme.is_baseline else self._reference(plan, source),
        )
        self._done(plan, self._with_origin(measurement, plan, source, published), published)
        if plan.settled.scheme.is_baseline:
            self._keep_reference(plan, source, loaded)

    def _eval_text(self, plan: Plan) -> str:
        return self._order.texts[plan.settled.protocol.eval_text_sha256]

    def _reference_folder(self, plan: Plan, source: LocalSource) -> Path:
        from worker.benchmark.reference import reference_name

        name = reference_name(
            fingerprint=source.fingerprint,
            dtype=plan.settled.dtype,
            device_name=self._order.device_name,
            protocol=plan.settled.protocol,
        )
        return self._order.storage / "base-logits" / name

    def _reference(self, plan: Plan, source: LocalSource) -> Reference | None:
        """The base's outputs, if it was measured on such a device by this protocol."""
        from worker.benchmark.reference import open_reference

        return open_reference(self._reference_folder(plan, source))

    def _keep_reference(self, plan: Plan, source: LocalSource, loaded: Loaded) -> None:
        """Store the base's outputs for the quantized models. The base is measured: failing here costs only those
        comparisons."""
        from worker.benchmark.reference import prepare_reference

        try:
            prepare_reference(
                loaded, plan.settled.protocol, self._eval_text(plan), self._reference_folder(plan, source)
            )
        except JobError as error:
            log.warning("j%s: %s; quality will not be compared", plan.job_id, error)
            self._leave_spoilt_device(error)

    def _with_origin(
        self, measurement: Measurement, plan: Plan, source: LocalSource, published: Published | None
    ) -> Measurement:
        origin = {
            "checkpoint_key": plan.settled.key,
            "fingerprint": source.fingerprint,
            "commit": source.revision,
            "device_uuid": self._device_uuid(),
        }
        audit = {"audit": dict(published.audit)} if published is not None else {}
        return dataclasses.replace(
            measurement,
            device_name=self._order.device_name,
            quantize_s=published.quantize_s if published is not None else None,
            details=dict(measurement.details) | origin | audit,
        )

    def _device_uuid(self) -> str | None:
        """Of the one GPU that this process sees. Raises DeviceError where it sees another number of them."""
        if self._order.device_kind is not DeviceKind.CUDA:
            return None
        import torch

        if torch.cuda.device_count() != 1:
            raise DeviceError(f"pinned to one GPU, and {torch.cuda.device_count()} are visible")
        return f"GPU-{torch.cuda.get_device_properties(0).uuid}"

    def _done(self, plan: Plan, measurement: Measurement, published: Published | None) -> None:
        self._open.discard(plan.job_id)
        self._link.send(
            Measured(
                job_id=plan.job_id,
                measurement=measurement,
                protocol=plan.settled.protocol,
                checkpoint_path=published.path if published is not None else None,
            )
        )

    def _enter(self, job_ids: tuple[int, ...], stage_: Stage) -> None:
        if job_ids:
            log.info("%s: %s", ", ".join(f"j{n}" for n in job_ids), stage_)
            self._link.send(Entered(job_ids=job_ids, stage=stage_))

    @contextlib.contextmanager
    def _reports(self, job_ids: tuple[int, ...]) -> Iterator[None]:
        """An error within fails those of ``job_ids`` that are still open, and no others."""
        try:
            yield
        except Exception as error:
            translated = error if isinstance(error, JobError) else self._unforeseen(error)
            for job_id in job_ids:
                if job_id in self._open:
                    self._failed(job_id, translated)

    def _unforeseen(self, error: Exception) -> JobError:
        traceback.print_exc()
        kind = HostOom if isinstance(error, MemoryError) else InternalError
        return kind(one_line(error))

    def _failed(self, job_id: int, error: JobError) -> None:
        log.error("j%s: %s: %s", job_id, error.kind, error)
        self._open.discard(job_id)
        self._link.send(Failed(job_id=job_id, kind=error.kind, message=str(error)))
        self._leave_spoilt_device(error)

    def _leave_spoilt_device(self, error: JobError) -> None:
        """Leave what is open to a new runner, which begins with the whole device."""
        if isinstance(error, (CudaOom, DeviceError)):
            self._open.clear()

    def _throttled(self, message: Callable[..., Progressed]) -> Callable[..., None]:
        last = 0.0

        def report(*numbers: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS_INTERVAL_S:
                last = now
                self._link.send(message(*numbers))

        return report


def _free_device_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

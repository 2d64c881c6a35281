"""The process that owns the GPU: source → quantize → publish → verify → benchmark, for one bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from models_db.domain import Claim, DeviceKind, Measurement, Stage
from models_db.errors import CudaOom, DeviceError, InternalError, JobError
from models_db.identity import Settled, settle
from models_db.sources import read_headers, source_dtype
from worker.checkpoint import Origin, Published, checkpoint_path, find_published, publish, stage, unstage
from worker.fetch import LocalSource, fetched
from worker.messages import (
    Answered,
    CheckpointReady,
    Ended,
    Entered,
    Failed,
    Measured,
    Order,
    Progressed,
    Pulse,
    Resolved,
    RunnerMessage,
)

log = logging.getLogger("qbatch.runner")

_PROGRESS_INTERVAL_S = 0.3
_ORPHANED = 70


class Link:
    """The runner's end of the pipe. Its own thread reads, so that a silent supervisor is noticed during any work."""

    def __init__(self, connection: Connection, lease_s: float) -> None:
        self._connection = connection
        self._lease_s = lease_s
        self._answer: Answered | None = None
        self._answered = threading.Event()
        self._ended = False
        threading.Thread(target=self._listen, daemon=True, name="link").start()

    def send(self, message: RunnerMessage) -> None:
        self._connection.send(message)

    def end(self) -> None:
        """Say that there is no more to come; the supervisor may hang up."""
        self._ended = True
        self.send(Ended())

    def ask(self, resolved: Resolved) -> frozenset[int]:
        """The jobs that need no work."""
        self.send(resolved)
        self._answered.wait()
        assert self._answer is not None  # noqa: S101  (set before the event)
        return self._answer.job_ids

    def _listen(self) -> None:
        while True:
            try:
                # A worker that is stopped, or gone, has lost its lease by then: its runner must free the GPU.
                if not self._connection.poll(self._lease_s):
                    _leave("the worker has been silent for a lease")
                message = self._connection.recv()
            except (EOFError, OSError):
                if self._ended:
                    return
                _leave("the worker is gone")
            if isinstance(message, Answered):
                self._answer = message
                self._answered.set()
            elif not isinstance(message, Pulse):
                _leave(f"the worker said {message!r}")


def _leave(reason: str) -> None:
    # At once: there is nobody left to report to, and the main thread may sit in a kernel.
    print(f"runner: {reason}; leaving", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(_ORPHANED)


def run(order: Order, connection: Connection, log_path: Path) -> None:
    """A runner's whole life. Everything it has to say goes through ``connection``; its output into the log."""
    _redirect_output(log_path)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    link = Link(connection, order.lease_s)
    Bundle(order, link).run()
    link.end()
    # Not through interpreter shutdown: CUDA's teardown can hang, and everything is said and synced.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _redirect_output(log_path: Path) -> None:
    log_path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


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
        return stage(self._order.storage / ".staging", plan.job_id, plan.claim.attempt)

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
            eval_text=self._order.texts[plan.settled.protocol.eval_text_sha256],
            on_step=lambda step: log.info("j%s: %s", plan.job_id, step),
        )
        self._done(plan, self._with_origin(measurement, plan, source, published), published)

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
        return InternalError(f"{type(error).__name__}: {error}")

    def _failed(self, job_id: int, error: JobError) -> None:
        log.error("j%s: %s: %s", job_id, error.kind, error)
        self._open.discard(job_id)
        self._link.send(Failed(job_id=job_id, kind=error.kind, message=str(error)))
        if isinstance(error, (CudaOom, DeviceError)):
            # The process's hold on the device is spoilt or full; a new runner begins with all of it.
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

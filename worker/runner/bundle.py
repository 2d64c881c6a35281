"""Run a bundle on one device: fetch the source, quantize every width, publish, verify, and benchmark in rounds."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import Claim, DeviceKind, DType, Stage
from qbatch.core.errors import SourceChanged, StorageError, Unsupported
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.prior_quantization import stale_quantization
from qbatch.core.sources import read_config, source_dtype
from qbatch.worker.checkpoints.judged import judged
from qbatch.worker.checkpoints.publish import Origin, publish
from qbatch.worker.checkpoints.published import Verified, find_published
from qbatch.worker.checkpoints.sidecars import sidecar_bytes
from qbatch.worker.files.staging import stage, storage_error, unstage
from qbatch.worker.models.architecture import load_tokenizer, why_no_tokenizer
from qbatch.worker.models.code_vetting import vet_code
from qbatch.worker.models.load import translated
from qbatch.worker.models.remote_code import copy_code
from qbatch.worker.models.vet import vet_source
from qbatch.worker.runner.checkpoint_jobs import MeasuredModel, Plan, by_key, plan_job
from qbatch.worker.runner.finished_rows import FinishedRows
from qbatch.worker.runner.finite_weights import refuse_not_finite
from qbatch.worker.runner.loaded_models import free_device_memory
from qbatch.worker.runner.measured_rounds import Rounds
from qbatch.worker.runner.messages import (
    Answered,
    CheckpointReady,
    CheckpointVerified,
    Order,
    Progressed,
    Resolved,
)
from qbatch.worker.runner.quiet import Quiet
from qbatch.worker.runner.reports import ReportChannel, Reports
from qbatch.worker.runner.shared_speeds import SpeedKeys, agreeing
from qbatch.worker.runner.skip_lists import SkipLists
from qbatch.worker.runner.trial import NOT_ASKED_FOR, Trial
from qbatch.worker.sources.fetch import LocalSource, fetch_source

if TYPE_CHECKING:
    from qbatch.worker.quantizing import Refused, Written

log = logging.getLogger("qbatch.runner")

_PROGRESS_INTERVAL_S = 0.3


class Bundle:
    """The jobs of one source, run on one device."""

    def __init__(self, order: Order, link: ReportChannel, quiet: Quiet) -> None:
        self._order = order
        self._quiet = quiet
        self._reports = Reports(link, (claim.job_id for claim in order.claims))
        self._device = "cuda:0" if order.device_kind is DeviceKind.CUDA else "cpu"

    def run(self) -> None:
        """Run all jobs. Each ends with a message, unless a fault makes the device unusable for the remaining ones."""
        ids = self._reports.open()
        self._reports.enter(ids, Stage.FETCHING)
        with self._reports.failing(ids), self._source() as source:
            self._work(source)

    @contextlib.contextmanager
    def _source(self) -> Iterator[LocalSource]:
        ids = self._reports.open()
        progress = self._throttled(
            lambda done, total: Progressed(job_ids=ids, bytes_read=done, bytes_written=0, bytes_total=total)
        )
        with fetch_source(
            self._order.claims[0].spec.source,
            cache=self._order.cache,
            cache_bytes=self._order.cache_bytes,
            policy=self._order.policy,
            on_progress=progress,
            digests=self._reports,
        ) as source:
            yield source

    def _work(self, source: LocalSource) -> None:
        # Judged once for all rows: what is no source of a checkpoint is no baseline either.
        headers = vet_source(source.folder)
        if (stale := stale_quantization(read_config(source.folder), headers)) is not None:
            log.warning("the quantization in config.json is ignored: %s", stale)
        vet_code(source.folder, trusted=source.runs_code)
        dtype = source_dtype(headers)
        skip_lists = SkipLists(source, dtype)
        settled = [plan for claim in self._order.claims for plan in self._plan(claim, source, dtype, skip_lists)]
        speed_keys = SpeedKeys(source, self._order.device_uuid)
        plans = [replace(plan, speed_key=speed_keys.of(plan.settled)) for plan in settled]
        if not plans:
            return
        answered = self._ask(plans)
        self._vet_tokenizer(source, [plan for plan in plans if self._reports.open([plan.job_id])])
        models = by_key(plan for plan in plans if self._reports.open([plan.job_id]))
        published = self._publish_all(source, models, answered.paths)
        self._measure(
            source,
            answered.speeds,
            [
                self._model(source, members, published.get(key))
                for key, members in models.items()
                if key in published or members[0].settled.scheme.is_baseline
            ],
        )

    def _vet_tokenizer(self, source: LocalSource, plans: Sequence[Plan]) -> None:
        """Read the tokenizer before anything is quantized: a fault in it would end the jobs that run a model later."""
        if (reason := why_no_tokenizer(source.folder)) is not None:
            log.warning("no text can be measured: %s", reason)
            return
        readers = [plan.job_id for plan in plans if plan.settled.protocol.runs_model]
        unreadable = translated(Unsupported, f"cannot load the tokenizer in {source.folder.name}")
        with self._reports.failing(readers), unreadable:
            load_tokenizer(source.folder, trusted=source.runs_code)

    def _measure(self, source: LocalSource, speeds: Mapping[int, KnownSpeed], models: Sequence[MeasuredModel]) -> None:
        """Models of which only the size was asked for are counted; the others are loaded."""
        rows = FinishedRows(self._order, self._reports, source)
        for model in models:
            if not model.runs:
                with self._reports.failing(model.ids):
                    rows.send_counted(model)
        loaded = [model for model in models if model.runs]
        rounds = Rounds(self._order, self._reports, source, self._device, rows, self._quiet)
        rounds.run(loaded, agreeing(speeds, loaded))

    def _plan(self, claim: Claim, source: LocalSource, dtype: DType, skip_lists: SkipLists) -> list[Plan]:
        """None where a library that its method needs is not here, or its skip list cannot be resolved, which is that
        job's fault alone."""
        with self._reports.failing([claim.job_id]):
            return [plan_job(claim, source, dtype, self._order.device_kind, skip_lists.of(claim.spec))]
        return []

    def _ask(self, plans: Sequence[Plan]) -> Answered:
        """Ask which jobs are answered already, which closes them, and what else is known."""
        answered = self._reports.ask(Resolved(jobs={plan.job_id: plan.identity for plan in plans}))
        if not answered.unverified:
            return answered
        for path, key in answered.unverified.items():
            # A checkpoint that cannot be verified answers no job, but that is no failure of these jobs.
            try:
                verified = find_published(self._order.storage, path, key)
                if verified is not None:
                    self._reports.send(CheckpointVerified(published=verified.confirm()))
            except (StorageError, SourceChanged) as error:
                log.warning("an earlier result cannot be reused: %s", error)
        still_open = {plan.job_id: plan.identity for plan in plans if self._reports.open([plan.job_id])}
        return self._reports.ask(Resolved(jobs=still_open))

    def _model(self, source: LocalSource, plans: tuple[Plan, ...], verified: Verified | None) -> MeasuredModel:
        folder = source.folder if verified is None else self._order.storage / verified.published.path
        return MeasuredModel(plans=plans, folder=folder, verified=verified)

    def _publish_all(
        self, source: LocalSource, models: Mapping[str, tuple[Plan, ...]], paths: Mapping[str, str]
    ) -> dict[str, Verified]:
        """The checkpoint of every quantized model, by its key.

        A published one that verifies is reused; otherwise it is written now, once for all jobs that need it.
        """
        published: dict[str, Verified] = {}
        missing: list[tuple[Plan, ...]] = []
        for key, plans in models.items():
            if plans[0].settled.scheme.is_baseline:
                continue
            with self._reports.failing(plan.job_id for plan in plans):
                # A source with the same content may have been published under another name.
                candidates = dict.fromkeys([paths.get(key, plans[0].path), plans[0].path])
                existing = next(
                    filter(None, (find_published(self._order.storage, path, key) for path in candidates)), None
                )
                if existing is None:
                    missing.append(plans)
                else:
                    log.info("j%s: reusing the published checkpoint %s", plans[0].job_id, existing.published.path)
                    published[key] = existing
        if missing:
            published |= self._quantize(source, missing)
        for key, checkpoint in published.items():
            for plan in models[key]:
                self._reports.send(CheckpointReady(job_id=plan.job_id, published=checkpoint.published))
        return published

    def _quantize(self, source: LocalSource, models: list[tuple[Plan, ...]]) -> dict[str, Verified]:
        from qbatch.worker.quantizing import Target, write_checkpoints

        ids = tuple(plan.job_id for plans in models for plan in plans)
        self._reports.enter(ids, Stage.QUANTIZING)
        progress = self._throttled(
            lambda read, written, total: Progressed(
                job_ids=ids, bytes_read=read, bytes_written=written, bytes_total=total
            )
        )
        published: dict[str, Verified] = {}
        with self._reports.failing(ids):
            beside_bytes = self._beside_bytes(source)
            by_folder = {self._stage(plans[0]): plans for plans in models}
            targets = [
                Target(
                    scheme=plans[0].settled.scheme,
                    folder=folder,
                    trusted=source.runs_code,
                    beside_bytes=beside_bytes,
                )
                for folder, plans in by_folder.items()
            ]
            try:
                outcomes = write_checkpoints(
                    source.folder,
                    targets,
                    dtype=models[0][0].settled.dtype,
                    device=self._device,
                    on_progress=progress,
                )
                published = self._publish_each(source, outcomes, by_folder)
            finally:
                for folder in by_folder:
                    unstage(folder)
        free_device_memory()
        return published

    def _publish_each(
        self,
        source: LocalSource,
        outcomes: Iterable[Written | Refused],
        by_folder: Mapping[Path, tuple[Plan, ...]],
    ) -> dict[str, Verified]:
        """Publish each checkpoint as soon as it is written, side by side: most of that is waiting for the disk."""
        from qbatch.worker.quantizing import Refused

        one_at_a_time = threading.Lock()

        def confirm() -> None:
            with one_at_a_time:
                source.confirm()

        unwritten = {plan.job_id for plans in by_folder.values() for plan in plans}
        futures: list[tuple[tuple[Plan, ...], Future[Verified]]] = []
        with ThreadPoolExecutor(len(by_folder), thread_name_prefix="publish") as pool:
            for outcome in outcomes:
                plans = by_folder[outcome.target.folder]
                own_ids = tuple(plan.job_id for plan in plans)
                unwritten.difference_update(own_ids)
                if isinstance(outcome, Refused):
                    self._reports.failed(own_ids, outcome.error)
                else:
                    with self._reports.failing(own_ids):
                        audit = self._audit(source, outcome, plans)
                        futures.append((plans, pool.submit(self._publish, source, outcome, audit, plans[0], confirm)))
                if not unwritten:
                    self._reports.enter((plan.job_id for plans, _ in futures for plan in plans), Stage.PUBLISHING)
        published: dict[str, Verified] = {}
        for plans, future in futures:
            with self._reports.failing(plan.job_id for plan in plans), self._reports.failing_all_if_changed():
                published[plans[0].settled.key] = future.result()
        return published

    def _audit(self, source: LocalSource, written: Written, plans: Sequence[Plan]) -> Mapping[str, Any]:
        """What is stored about the checkpoint in its staging folder. Raises Unsupported if it must not be published."""
        refuse_not_finite(written.audit.get("not_finite", ()))
        if source.runs_code:
            copy_code(source.folder, written.target.folder)
        forward = self._try(written.target.folder, plans, source)
        return dict(written.audit) | {"writer": written.writer, "forward": forward} | judged(written.target.folder)

    def _publish(
        self, source: LocalSource, written: Written, audit: Mapping[str, Any], plan: Plan, confirm: Callable[[], None]
    ) -> Verified:
        return publish(
            written.target.folder,
            storage=self._order.storage,
            source=source.folder,
            key=plan.settled.key,
            origin=self._origin(plan, source),
            files=written.files,
            audit=audit,
            quantize_s=written.quantize_s,
            confirm=confirm,
        )

    def _try(self, folder: Path, plans: Sequence[Plan], source: LocalSource) -> str:
        """Run the staged checkpoint once, unless nothing of it is going to run. Raises Unsupported."""
        if not any(plan.settled.protocol.runs_model for plan in plans):
            return NOT_ASKED_FOR
        settled = plans[0].settled
        trial = Trial(dtype=settled.dtype, device=self._device, trusted=source.runs_code)
        return trial.try_checkpoint(folder, source.folder, settled.scheme)

    def _beside_bytes(self, source: LocalSource) -> int:
        try:
            return sidecar_bytes(source.folder, with_code=source.runs_code)
        except OSError as error:
            raise storage_error(error, "cannot read the files next to the weights") from error

    def _stage(self, plan: Plan) -> Path:
        return stage(self._order.staging, plan.job_id, plan.claim.attempt)

    def _origin(self, plan: Plan, source: LocalSource) -> Origin:
        from qbatch.worker.measuring.versions import versions

        return Origin(
            model=plan.claim.spec.source.name,
            revision=source.revision,
            fingerprint=source.fingerprint,
            scheme=plan.settled.scheme,
            dtype=plan.settled.dtype,
            device_kind=self._order.device_kind,
            device_name=self._order.device_name,
            versions={name: str(value) for name, value in versions(*plan.settled.scheme.description.libraries).items()},
        )

    def _throttled(self, message: Callable[..., Progressed]) -> Callable[..., None]:
        last = 0.0

        def report(*numbers: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS_INTERVAL_S or sum(numbers[:-1]) == numbers[-1]:
                last = now
                self._reports.send(message(*numbers))

        return report

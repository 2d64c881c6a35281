"""Quantizes a source and publishes its checkpoints, once for all jobs that need one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import Stage
from qbatch.core.errors import Unsupported
from qbatch.worker.checkpoints.loading_audit import loading_audit
from qbatch.worker.checkpoints.publish import publish
from qbatch.worker.checkpoints.published import Verified, find_published
from qbatch.worker.checkpoints.sidecars import copy_sidecars, sidecar_bytes
from qbatch.worker.files.staging import stage, storage_error, unstage
from qbatch.worker.models.remote_code import copy_code
from qbatch.worker.runner.checkpoint_jobs import Plan
from qbatch.worker.runner.checkpoint_origin import origin_of
from qbatch.worker.runner.finite_weights import refuse_not_finite
from qbatch.worker.runner.loaded_models import Jobs, LoadedModels, free_device_memory
from qbatch.worker.runner.messages import CheckpointReady, Order, Progressed
from qbatch.worker.runner.reports import Reports
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.runner.trial import NOT_ASKED_FOR, NotLoaded, Trial
from qbatch.worker.sources.fetch import LocalSource

if TYPE_CHECKING:
    from qbatch.worker.quantizing import Refused, Written

log = logging.getLogger("qbatch.runner")


class Publication:
    """The checkpoints of one source, quantized on ``device``. One that was tried may be held in ``loaded``."""

    def __init__(
        self,
        order: Order,
        reports: Reports,
        source: LocalSource,
        device: str,
        loaded: LoadedModels,
        pauses: TimingPauses,
    ) -> None:
        self._order = order
        self._reports = reports
        self._source = source
        self._device = device
        self._loaded = loaded
        self._pauses = pauses
        # Whether the bundle measures a baseline, which comes before anything else: the others are compared with it, and
        # it loses the least time with the first generation of a process, which is a long one.
        self._begins_with_baseline = False

    def publish_all(self, models: Mapping[str, tuple[Plan, ...]], paths: Mapping[str, str]) -> dict[str, Verified]:
        """The checkpoint of every quantized model, by its key.

        A published one that verifies is reused; otherwise it is written now, once for all jobs that need it.
        """
        self._begins_with_baseline = any(plans[0].settled.scheme.is_baseline for plans in models.values())
        published: dict[str, Verified] = {}
        missing: list[tuple[Plan, ...]] = []
        for key, plans in models.items():
            if plans[0].settled.scheme.is_baseline:
                continue
            with self._reports.failing(plan.job_id for plan in plans):
                # A source with the same content may have been published under another name.
                candidates = dict.fromkeys([paths.get(key, plans[0].path), plans[0].path])
                existing = next(filter(None, (self._find(path, key) for path in candidates)), None)
                if existing is None:
                    missing.append(plans)
                else:
                    log.info("j%s: reusing the published checkpoint %s", plans[0].job_id, existing.published.path)
                    published[key] = existing
        if missing:
            published |= self._quantize(missing)
        for key, checkpoint in published.items():
            for plan in models[key]:
                self._reports.send(CheckpointReady(job_id=plan.job_id, published=checkpoint.published))
        return published

    def _find(self, path: str, key: str) -> Verified | None:
        return find_published(self._order.storage, path, key, database=self._order.database)

    def _quantize(self, models: list[tuple[Plan, ...]]) -> dict[str, Verified]:
        from qbatch.worker.quantizing import Target, write_checkpoints

        ids = tuple(plan.job_id for plans in models for plan in plans)
        self._reports.enter(ids, Stage.QUANTIZING)
        progress = self._reports.throttled(
            lambda read, written, total: Progressed(
                job_ids=ids, bytes_read=read, bytes_written=written, bytes_total=total
            )
        )
        published: dict[str, Verified] = {}
        with self._reports.failing(ids):
            beside_bytes = self._beside_bytes()
            by_folder = {self._stage(plans[0]): plans for plans in models}
            targets = [
                Target(
                    scheme=plans[0].settled.scheme,
                    folder=folder,
                    trusted=self._source.runs_code,
                    beside_bytes=beside_bytes,
                )
                for folder, plans in by_folder.items()
            ]
            try:
                outcomes = write_checkpoints(
                    self._source.folder,
                    targets,
                    dtype=models[0][0].settled.dtype,
                    device=self._device,
                    on_progress=progress,
                    before_whole=self._loaded.unload,
                )
                published = self._publish_each(outcomes, by_folder)
            finally:
                for folder in by_folder:
                    unstage(folder)
        free_device_memory()
        return published

    def _publish_each(
        self, outcomes: Iterable[Written | Refused], by_folder: Mapping[Path, tuple[Plan, ...]]
    ) -> dict[str, Verified]:
        """Publish each checkpoint as soon as it is written, side by side: most of that is waiting for the disk."""
        from qbatch.worker.quantizing import Refused

        one_at_a_time = threading.Lock()

        def confirm() -> None:
            with one_at_a_time:
                self._source.confirm()

        unwritten = {plan.job_id for plans in by_folder.values() for plan in plans}
        futures: list[tuple[Written, tuple[Plan, ...], Future[Verified]]] = []
        with ThreadPoolExecutor(len(by_folder), thread_name_prefix="publish") as pool:
            for outcome in outcomes:
                plans = by_folder[outcome.target.folder]
                own_ids = tuple(plan.job_id for plan in plans)
                unwritten.difference_update(own_ids)
                if isinstance(outcome, Refused):
                    self._reports.failed(own_ids, outcome.error)
                else:
                    # From here on it is tried, and a fault that ends the runner is its own.
                    self._reports.enter(own_ids, Stage.PUBLISHING)
                    with self._reports.failing(own_ids):
                        is_alone = all(future.done() for *_, future in futures)
                        # With an adapter, what is measured is not what was tried.
                        is_measured = all(plan.claim.spec.scheme.recovery is None for plan in plans)
                        audit = self._audit(outcome, plans, own_ids if is_alone and is_measured else None)
                        futures.append((outcome, plans, pool.submit(self._publish, outcome, audit, plans[0], confirm)))
                self._reports.enter(unwritten, Stage.QUANTIZING)
            self._reports.enter((plan.job_id for _, plans, _ in futures for plan in plans), Stage.PUBLISHING)
        published: dict[str, Verified] = {}
        for written, plans, future in futures:
            with self._reports.failing(plan.job_id for plan in plans), self._reports.failing_all_if_changed():
                published[plans[0].settled.key] = verified = future.result()
                if not _is_as_written(verified, written):
                    self._loaded.unload()
        return published

    def _audit(self, written: Written, plans: Sequence[Plan], next_jobs: Jobs | None) -> Mapping[str, Any]:
        """What is stored about the checkpoint in its staging folder. ``next_jobs``: its jobs, if what is tried may be
        measured right afterwards. Raises Unsupported if it must not be published."""
        refuse_not_finite(written.audit.get("not_finite", ()))
        if self._source.runs_code:
            copy_code(self._source.folder, written.target.folder)
        forward = self._try(written, plans, next_jobs)
        return (
            dict(written.audit) | {"writer": written.writer, "forward": forward} | loading_audit(written.target.folder)
        )

    def _publish(self, written: Written, audit: Mapping[str, Any], plan: Plan, confirm: Callable[[], None]) -> Verified:
        return publish(
            written.target.folder,
            storage=self._order.storage,
            source=self._source.folder,
            key=plan.settled.key,
            origin=origin_of(plan, self._source, self._order),
            files=written.files,
            audit=audit,
            quantize_s=written.quantize_s,
            confirm=confirm,
        )

    def _try(self, written: Written, plans: Sequence[Plan], next_jobs: Jobs | None) -> str:
        """Run the staged checkpoint once, unless nothing of it is going to run. Raises Unsupported."""
        if not any(plan.settled.protocol.runs_model for plan in plans):
            return NOT_ASKED_FOR
        settled = plans[0].settled
        if self._loaded.holds_any or self._begins_with_baseline:
            next_jobs = None
        if next_jobs is not None:
            self._complete(written.target.folder)
        trial = Trial(
            dtype=settled.dtype,
            device=self._device,
            trusted=self._source.runs_code,
            models=self._loaded,
            pauses=self._pauses,
            next_jobs=next_jobs,
        )
        try:
            return trial.try_checkpoint(written.target.folder, self._source.folder, settled.scheme)
        except NotLoaded as error:
            reason = written.audit.get("whole_model_because")
            raise Unsupported(
                f"{error}; {reason}: name such layers in --skip-modules" if reason else str(error)
            ) from error

    def _complete(self, folder: Path) -> None:
        """Copy what is published besides the weights, so that the tokenizer is loaded as well."""
        try:
            copy_sidecars(self._source.folder, folder)
        except OSError as error:
            raise storage_error(error, "cannot copy the files next to the weights") from error

    def _beside_bytes(self) -> int:
        try:
            return sidecar_bytes(self._source.folder, with_code=self._source.runs_code)
        except OSError as error:
            raise storage_error(error, "cannot read the files next to the weights") from error

    def _stage(self, plan: Plan) -> Path:
        return stage(self._order.staging, plan.job_id, plan.claim.attempt)


def _is_as_written(verified: Verified, written: Written) -> bool:
    """Whether the weights are those that were tried: another writer may have published the checkpoint first."""
    found = {file.name: file.checksums.chunk_sha256 for file in verified.content.files}
    return all(found.get(digest.name) == digest.chunk_sha256 for digest in written.files)

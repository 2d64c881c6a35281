"""Makes the adapters of a source's checkpoints, and publishes each beside the checkpoint that it belongs to."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import Stage
from qbatch.core.errors import BenchmarkError, Unsupported
from qbatch.core.methods.registry import is_installed
from qbatch.core.recovery import EXTRA, LIBRARY, Recovery
from qbatch.core.search.shared_run import shared_passage_text, shared_run
from qbatch.worker.checkpoints.publish import publish_adapter
from qbatch.worker.checkpoints.published import Verified, adapter_path, find_published
from qbatch.worker.files.staging import KEPT_TRAININGS, stage, storage_error, unstage
from qbatch.worker.models.load import translated
from qbatch.worker.models.tokenizer import load_tokenizer
from qbatch.worker.runner.checkpoint_jobs import Plan
from qbatch.worker.runner.checkpoint_origin import origin_of
from qbatch.worker.runner.loaded_models import free_device_memory
from qbatch.worker.runner.messages import CheckpointReady, Order
from qbatch.worker.runner.reports import Reports
from qbatch.worker.runner.trial import NOT_ASKED_FOR, RAN
from qbatch.worker.sources.fetch import LocalSource

if TYPE_CHECKING:
    from qbatch.worker.files.training_state import KeptState

log = logging.getLogger("qbatch.runner")


class AdapterPublication:
    """The adapters of one source, made on ``device``."""

    def __init__(self, order: Order, reports: Reports, source: LocalSource, device: str) -> None:
        self._order = order
        self._reports = reports
        self._source = source
        self._device = device

    def publish_all(
        self, models: Mapping[str, tuple[Plan, ...]], bases: Mapping[str, Verified], paths: Mapping[str, str]
    ) -> dict[str, Verified]:
        """The adapter of each of ``models`` that has one and whose checkpoint is among ``bases``, by its key.

        A published one that verifies is reused. ``paths`` are those of the checkpoints on record, by key.
        """
        published: dict[str, Verified] = {}
        for key, plans in models.items():
            base = bases.get(plans[0].settled.base_key or "")
            if base is None or not self._reports.open(plan.job_id for plan in plans):
                continue
            with self._reports.failing(plan.job_id for plan in plans):
                self._refuse_shared_text(plans)
                published[key] = self._existing(plans[0], base, paths.get(key)) or self._make(plans, base)
                for plan in plans:
                    self._reports.send(CheckpointReady(job_id=plan.job_id, published=published[key].published))
        return published

    def _refuse_shared_text(self, plans: Sequence[Plan]) -> None:
        """Raise Unsupported if an adapter is trained on a passage that it is then judged by."""
        recovery = _recovery(plans[0])
        if not recovery.kind.is_trained:
            return
        tokenizer, _ = load_tokenizer(self._source.folder, trusted=self._source.runs_code)
        if tokenizer is None:
            return

        def ids(sha256: str) -> Sequence[int]:
            found: Sequence[int] = tokenizer(self._order.texts[sha256], add_special_tokens=False)["input_ids"]
            return found

        own = ids(str(recovery.text_sha256))
        protocol = plans[0].settled.protocol
        for sha256 in (protocol.eval_text_sha256, *(text.sha256 for text in protocol.more_texts)):
            if (run := shared_run(own, ids(sha256))) is not None:
                raise Unsupported(shared_passage_text(tokenizer.decode(list(run))))

    def _existing(self, plan: Plan, base: Verified, path: str | None) -> Verified | None:
        beside = adapter_path(base.published.path, _recovery(plan), plan.settled.key)
        for candidate in dict.fromkeys(filter(None, (path, beside))):
            found = find_published(self._order.storage, candidate, plan.settled.key, database=self._order.database)
            if found is not None:
                log.info("j%s: reusing the published adapter %s", plan.job_id, candidate)
                return found
        return None

    def _make(self, plans: Sequence[Plan], base: Verified) -> Verified:
        ids = tuple(plan.job_id for plan in plans)
        self._reports.enter(ids, Stage.QUANTIZING)
        folder = stage(self._order.staging, plans[0].job_id, plans[0].claim.attempt)
        try:
            begin_s = time.perf_counter()
            audit = self._recover(plans[0], base, folder)
            recover_s = time.perf_counter() - begin_s
            audit["adapter_forward"] = self._try(plans, base, folder)
            self._reports.enter(ids, Stage.PUBLISHING)
            published = publish_adapter(
                folder,
                storage=self._order.storage,
                base=base.published,
                key=plans[0].settled.key,
                origin=origin_of(plans[0], self._source, self._order),
                audit=audit,
                recover_s=recover_s,
                confirm=lambda: self._confirm(base),
            )
            self._kept(plans[0]).remove()
            return published
        finally:
            unstage(folder)
            free_device_memory()

    def _recover(self, plan: Plan, base: Verified, folder: Path) -> dict[str, Any]:
        from qbatch.worker.recovering.distillation import recover_by_training
        from qbatch.worker.recovering.svd_recovery import RecoveryWork, recover_by_factors

        def report(step: str) -> None:
            self._reports.step([plan.job_id], step)

        recovery = _recovery(plan)
        work = RecoveryWork(
            source=self._source.folder,
            base=self._order.storage / base.published.path,
            recovery=recovery,
            dtype=plan.settled.dtype,
            device=self._device,
            trusted=self._source.runs_code,
            text=None if recovery.text_sha256 is None else self._order.texts[recovery.text_sha256],
        )
        try:
            with translated(BenchmarkError, f"cannot make an adapter of {self._source.folder.name}"):
                if recovery.kind.is_trained:
                    return recover_by_training(work, folder, self._kept(plan), report)
                return recover_by_factors(work, folder, report)
        except OSError as error:
            raise storage_error(error, "cannot write an adapter") from error

    def _kept(self, plan: Plan) -> KeptState:
        """Where a training is kept, so that another attempt on any worker can continue it. The folder has the
        adapter's key, so it is for this source and checkpoint."""
        from qbatch.worker.files.training_state import KeptState

        return KeptState(folder=self._order.staging.parent / KEPT_TRAININGS / plan.settled.key)

    def _try(self, plans: Sequence[Plan], base: Verified, folder: Path) -> str:
        """Run the checkpoint once with the staged adapter, unless nothing of it is going to run. Raises JobErrors."""
        import torch

        from qbatch.worker.measuring.speed.model_inputs import one_token, reads_text
        from qbatch.worker.models.load import load

        if not any(plan.settled.protocol.runs_model for plan in plans):
            return NOT_ASKED_FOR
        if not is_installed(LIBRARY):
            raise Unsupported(
                f"adapters are measured with PEFT, which is not installed here: pip install 'qbatch[{EXTRA}]'"
            )
        free_device_memory()
        model = load(
            self._order.storage / base.published.path,
            dtype=plans[0].settled.dtype,
            device=self._device,
            trusted=self._source.runs_code,
            adapter=folder,
        ).model
        if not reads_text(model):
            return "not tried: it takes no text"
        failure = "the checkpoint runs and its adapter does not, so it is not published"
        with translated(Unsupported, failure), torch.inference_mode():
            model(**one_token(model))
        return RAN

    def _confirm(self, base: Verified) -> None:
        self._reports.confirm(self._source)
        base.confirm()


def _recovery(plan: Plan) -> Recovery:
    recovery = plan.settled.scheme.recovery
    if recovery is None:
        raise ValueError(f"j{plan.job_id} has no adapter")
    return recovery

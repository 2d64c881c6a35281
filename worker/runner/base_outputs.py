"""The outputs of a bundle's baseline, with which its quantized models are compared."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qbatch.core.domain import Protocol, TextRef
from qbatch.core.errors import DeviceError, JobError, SourceChanged
from qbatch.core.measured.quality_figures import BASE_OUTPUTS_LOST, BASE_OUTPUTS_MISSING
from qbatch.core.storage import BASE_OUTPUTS
from qbatch.worker.files.staging import folder_of
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.runner.checkpoint_jobs import Plan
from qbatch.worker.runner.loaded_models import free_device_memory
from qbatch.worker.runner.messages import Order
from qbatch.worker.runner.reports import Reports
from qbatch.worker.sources.fetch import LocalSource

if TYPE_CHECKING:
    from torch import Tensor

    from qbatch.worker.measuring.quality.perplexity import WindowScores
    from qbatch.worker.measuring.quality.probes import Probe
    from qbatch.worker.measuring.quality.reference import Reference
    from qbatch.worker.measuring.subject import Subject
    from qbatch.worker.models.load import LoadedModel

log = logging.getLogger("qbatch.runner")

_NO_REFERENCE = (
    f"{BASE_OUTPUTS_MISSING}: it was not measured on such a device with these versions before, or they were removed to "
    "free space (`--force` measures both again)"
)
_NOTHING_TO_COMPARE = "the text contains no token that can be scored or masked, so there is nothing to compare"


class BaseOutputs:
    """Stores the outputs of baselines of one source, and finds them again."""

    def __init__(self, order: Order, reports: Reports, source: LocalSource) -> None:
        self._order = order
        self._reports = reports
        self._source = source
        # By folder, why the outputs of a baseline were not stored.
        self._not_kept: dict[Path, str] = {}

    def find(self, plan: Plan, text: TextRef | None = None) -> Reference | None:
        """The outputs of the baseline on a text, if it was measured on such a device with it."""
        from qbatch.worker.measuring.quality.reference import open_reference

        return open_reference(self._folder(_protocol(plan, text), plan))

    def why_missing(self, plan: Plan, text: TextRef | None = None) -> str:
        return self._not_kept.get(self._folder(_protocol(plan, text), plan), _NO_REFERENCE)

    def keep(self, plan: Plan, subject: Subject, loaded: LoadedModel) -> dict[str, WindowScores]:
        """Store the outputs of the ``loaded`` baseline on each text. Returns the windows that were scored on the way,
        by the sha256 of their text: none of a text whose outputs are there already.

        If that fails, only the comparisons are missing, unless the device has become unusable.
        """
        protocol = subject.protocol
        scores = {protocol.eval_text_sha256: self._keep(plan, protocol, subject.eval_text, subject, loaded)}
        for text in protocol.more_texts:
            own = subject.texts[text.sha256]
            scores[text.sha256] = self._keep(plan, _protocol(plan, text), own, subject, loaded)
        return scores

    def _keep(
        self, plan: Plan, protocol: Protocol, eval_text: str, subject: Subject, loaded: LoadedModel
    ) -> WindowScores:
        from qbatch.worker.measuring.quality.perplexity import WindowScores
        from qbatch.worker.measuring.quality.reference import prepare_reference

        scores = WindowScores()

        def score(number: int, count: int, probe: Probe, logits: Tensor) -> None:
            subject.on_step(f"outputs for comparison {number + 1}/{count}")
            if loaded.kind is ModelKind.CAUSAL_LM:
                scores.add(number, logits, probe.targets)

        subject.on_step("outputs for comparison")
        folder = self._folder(protocol, plan)
        try:
            kept = prepare_reference(
                loaded,
                protocol,
                eval_text,
                folder,
                # A baseline stages nothing else. If this runner is killed, its staging folder is removed.
                staging=folder_of(self._order.staging, plan.job_id, plan.claim.attempt),
                confirm=lambda: self._reports.confirm(self._source),
                on_window=score,
            )
            if kept is None:
                self._not_kept[folder] = _NOTHING_TO_COMPARE
            return scores
        except (DeviceError, SourceChanged):
            raise
        except JobError as error:
            log.warning("j%s: %s; quality will not be compared with the baseline", plan.job_id, error)
            self._not_kept[folder] = f"{BASE_OUTPUTS_LOST}: {error}"
        free_device_memory()
        return scores

    def _folder(self, protocol: Protocol, plan: Plan) -> Path:
        from qbatch.worker.measuring.quality.reference import reference_name

        name = reference_name(
            fingerprint=self._source.fingerprint,
            dtype=plan.settled.dtype,
            device_name=self._order.device_name,
            protocol=protocol,
        )
        return self._order.storage / BASE_OUTPUTS / name


def _protocol(plan: Plan, text: TextRef | None) -> Protocol:
    """The protocol of a further text, or of the first."""
    protocol = plan.settled.protocol
    return protocol if text is None else protocol.on_text(text)

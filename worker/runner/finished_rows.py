"""The rows of a bundle's jobs: completed with where they come from, and sent once their files were confirmed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qbatch.core.domain import DeviceKind, Stage
from qbatch.core.errors import DeviceError, JobError
from qbatch.core.measured.checkpoint_audit import CheckpointAudit
from qbatch.core.measured.details import Details
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.runner.checkpoint_jobs import MeasuredModel, Plan
from qbatch.worker.runner.messages import CheckpointReady, Measured, Order
from qbatch.worker.runner.reports import Reports
from qbatch.worker.runner.shared_speeds import may_be_shared
from qbatch.worker.sources.fetch import LocalSource

if TYPE_CHECKING:
    from qbatch.worker.measuring.subject import Subject

log = logging.getLogger("qbatch.runner")


class FinishedRows:
    """Sends the final message of each job that has succeeded."""

    def __init__(self, order: Order, reports: Reports, source: LocalSource) -> None:
        self._order = order
        self._reports = reports
        self._source = source

    def subject(self, model: MeasuredModel) -> Subject:
        from qbatch.worker.measuring.subject import Subject

        settled = model.plans[0].settled
        return Subject(
            folder=model.folder,
            dtype=settled.dtype,
            compute_dtype=settled.scheme.resolved(settled.dtype).compute_dtype,
            protocol=settled.protocol,
            eval_text=self._order.texts[settled.protocol.eval_text_sha256],
            texts=self._order.texts,
            adapter=model.adapter,
            on_step=lambda step: self._reports.step(model.ids, step),
        )

    def send_counted(self, model: MeasuredModel) -> None:
        """Send the rows of a model of which only the size was asked for: it is not loaded."""
        from qbatch.worker.measuring.size_only import measure_size_only

        self._reports.enter(model.ids, Stage.BENCHMARKING)
        measurement = measure_size_only(self.subject(model), trusted=self._source.runs_code)
        self.confirm(model)
        for job_id in self._reports.open(model.ids):
            self.send(model, job_id, measurement)

    def send_unmeasured(self, model: MeasuredModel, error: JobError) -> None:
        """Send the rows of a published model that cannot be measured: with its size, and why there is no more."""
        from qbatch.worker.measuring.measurement_details import under_protocol, without_parts
        from qbatch.worker.measuring.size_only import measure_size_only

        measurement = measure_size_only(self.subject(model), trusted=self._source.runs_code)
        self.confirm(model)
        for plan in model.plans:
            if self._reports.open([plan.job_id]):
                protocol = plan.settled.protocol
                missing = dict.fromkeys(sorted(protocol.parts - {MeasuredPart.SIZE}), str(error))
                row = without_parts(under_protocol(measurement, protocol), missing, may_pass=error.may_pass)
                self.send(model, plan.job_id, row)

    def confirm(self, model: MeasuredModel) -> None:
        """After the last use of the model, raise SourceChanged if its files have changed."""
        if model.verified is None:
            self._reports.confirm(self._source)
            return
        # The job's own last: with the one that is reported last its outcome is recorded.
        for verified in filter(None, (model.base, model.verified)):
            published = verified.confirm()
            for job_id in self._reports.open(model.ids):
                self._reports.send(CheckpointReady(job_id=job_id, published=published))

    def send(self, model: MeasuredModel, job_id: int, measurement: Measurement) -> None:
        plan = next(plan for plan in model.plans if plan.job_id == job_id)
        published = model.published
        self._reports.done(
            Measured(
                job_id=job_id,
                measurement=self._with_origin(measurement, plan, model),
                protocol=plan.settled.protocol,
                checkpoint_path=published.path if published is not None else None,
            )
        )

    def _with_origin(self, measurement: Measurement, plan: Plan, model: MeasuredModel) -> Measurement:
        published = model.published
        details = dataclasses.replace(
            measurement.details,
            checkpoint_key=plan.settled.key,
            base_key=plan.settled.base_key,
            fingerprint=self._source.fingerprint,
            commit=self._source.revision,
            device_uuid=self._device_uuid(),
            speed_key=self._shared_key(measurement.details, plan),
            audit=CheckpointAudit.from_json(model.audit),
        )
        return dataclasses.replace(
            measurement,
            device_name=self._order.device_name,
            quantize_s=published.quantize_s if published is not None else None,
            details=details,
        )

    def _shared_key(self, details: Details, plan: Plan) -> str | None:
        """The key by which others may have the row's speed; None if it is not its own, or may not be theirs."""
        is_own = details.speed_from is None
        return plan.speed_key if is_own and may_be_shared(details, self._order.device_kind) else None

    def _device_uuid(self) -> str | None:
        """The UUID of the GPU; None on a CPU. Raises DeviceError unless exactly one GPU is visible."""
        if self._order.device_kind is not DeviceKind.CUDA:
            return None
        import torch

        if torch.cuda.device_count() != 1:
            raise DeviceError(f"exactly one GPU should be visible to this process, but {torch.cuda.device_count()} are")
        return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def names(job_ids: Iterable[int]) -> str:
    return ", ".join(f"j{job_id}" for job_id in job_ids)

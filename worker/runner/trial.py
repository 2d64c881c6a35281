"""Tries a checkpoint before it is published: one forward pass. Where only quantization stops it, the job fails here.

qbatch never changes a scheme by itself. It says which layers should be left unquantized, after it has tried that.

The model is not kept for the benchmark, which loads the published files again (docs/performance.md, "Trying a
checkpoint", has the figures): a forward pass repacks 4-bit weights on a CPU, so that neither the size nor the peak of
memory would be those of a freshly loaded model, and the baseline is measured first, and alone on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import DType, Scheme
from qbatch.core.errors import BenchmarkError, CudaOom, DeviceError, HostOom, JobError, Unsupported, one_line
from qbatch.worker.machine.device_faults import find_fault
from qbatch.worker.runner.loaded_models import free_device_memory

if TYPE_CHECKING:
    from qbatch.worker.measuring.speed.noise_forms import Inputs

RAN = "ran"
NOT_ASKED_FOR = "not tried: only its size was asked for"


class NotLoaded(Unsupported):
    """The checkpoint can be written, and not be read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How models are loaded to be tried."""

    dtype: DType
    device: str
    trusted: bool

    def try_checkpoint(self, folder: Path, source: Path, scheme: Scheme) -> str:
        """Run the staged checkpoint in ``folder`` once. Returns RAN, or why nothing can be said against it.

        Raises Unsupported if ``source`` runs and the checkpoint does not or cannot be loaded, DeviceError.
        """
        try:
            if self._runs(folder):
                return RAN
            inputs, of_source = self._inputs(source)
            if of_source is not None:
                return f"neither it nor the source runs in {self.dtype}: {of_source}"
            said = self._explain(folder, inputs, scheme)
        except (DeviceError, NotLoaded):
            raise
        except JobError as error:  # the same error is met again, and has its effect, when the model is measured
            return f"not tried: {error}"
        finally:
            free_device_memory()
        raise Unsupported(f"the source runs and the checkpoint does not, so it is not published: {said}")

    def _load(self, folder: Path) -> Any:
        from qbatch.worker.models.load import load

        free_device_memory()
        return load(folder, dtype=self.dtype, device=self.device, trusted=self.trusted).model

    def _runs(self, folder: Path) -> bool:
        from qbatch.worker.measuring.speed.model_inputs import noise_inputs, one_token, reads_text

        try:
            model = self._load(folder)
        except BenchmarkError as error:
            raise NotLoaded(f"transformers cannot read the checkpoint, so it is not published: {error}") from error
        if reads_text(model):
            return _fault(model, one_token(model)) is None
        try:
            noise_inputs(model, 1)
        except Unsupported:  # whether that is because of the noise or of the weights, the source shows
            return False
        return True

    def _inputs(self, source: Path) -> tuple[Inputs, str | None]:
        """Inputs for the source, and why it does not run with them."""
        from qbatch.worker.measuring.speed.model_inputs import noise_inputs, one_token, reads_text

        model = self._load(source)
        if not reads_text(model):
            return noise_inputs(model, 1), None
        inputs = one_token(model)
        fault = _fault(model, inputs)
        return inputs, None if fault is None else one_line(fault.error)

    def _explain(self, folder: Path, inputs: Inputs, scheme: Scheme) -> str:
        model = self._load(folder)
        fault = _fault(model, inputs)
        return "it runs at the second attempt" if fault is None else fault.explain(model, inputs, scheme)


def _fault(model: Any, inputs: Inputs) -> Any:
    """The first fault of a forward pass; None if it runs. Raises CudaOom, HostOom or DeviceError for those."""
    from qbatch.worker.runner.first_fault import find_first_fault

    fault = find_first_fault(model, inputs)
    of_device = None if fault is None else find_fault(fault.error)
    if of_device is not None and issubclass(of_device.kind, (CudaOom, HostOom, DeviceError)):
        raise of_device.kind(one_line(of_device.error)) from of_device.error
    return fault

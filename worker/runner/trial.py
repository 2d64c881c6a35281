"""Tries a checkpoint before it is published: one forward pass. Where only quantization stops it, the job fails here.

qbatch never changes a scheme by itself. It says which layers should be left unquantized, after it has tried that.

The model that was tried is the one that is benchmarked, if it is measured next, and as it was loaded: on some CPUs a
forward pass repacks 4-bit weights (docs/performance.md, "Trying a checkpoint").
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import DType, Scheme
from qbatch.core.errors import BenchmarkError, CudaOom, DeviceError, HostOom, JobError, Unsupported, one_line
from qbatch.worker.machine.device_faults import find_fault
from qbatch.worker.runner.loaded_models import Jobs, LoadedModels, free_device_memory, load_fresh
from qbatch.worker.runner.timing_pauses import TimingPauses

if TYPE_CHECKING:
    from qbatch.worker.measuring.speed.noise_forms import Inputs
    from qbatch.worker.models.load import LoadedModel

log = logging.getLogger("qbatch.runner")

RAN = "ran"
NOT_ASKED_FOR = "not tried: only its size was asked for"


class NotLoaded(Unsupported):
    """The checkpoint can be written, and not be read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How models are loaded to be tried. ``next_jobs``: those that the checkpoint is measured for right afterwards;
    then it is held in ``models``, and loaded as if the benchmark loaded it."""

    dtype: DType
    device: str
    trusted: bool
    models: LoadedModels
    pauses: TimingPauses
    next_jobs: Jobs | None = None

    def try_checkpoint(self, folder: Path, source: Path, scheme: Scheme) -> str:
        """Run the staged checkpoint in ``folder`` once. Returns RAN, or why nothing can be said against it.

        Raises Unsupported if ``source`` runs and the checkpoint does not or cannot be loaded, DeviceError.
        """
        try:
            if self._runs_beside_others(folder):
                return RAN
            self.models.unload()
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

    def _load(self, folder: Path) -> LoadedModel:
        from qbatch.worker.models.load import load

        return load(folder, dtype=self.dtype, device=self.device, trusted=self.trusted)

    def _load_alone(self, folder: Path) -> Any:
        free_device_memory()
        return self._load(folder).model

    def _runs_beside_others(self, folder: Path) -> bool:
        """Whether it runs. What is held for the benchmark is unloaded if the device does not hold both."""
        from qbatch.worker.measuring.speed.size import disk_bytes

        self.models.make_room(disk_bytes(folder))
        try:
            return self._runs(folder)
        except (CudaOom, HostOom) as error:
            if not self.models.holds_any:
                raise
            log.warning("memory ran out while a checkpoint was tried (%s); nothing is held beside it now", error)
        # After the except clause, because the error refers to what the work had allocated.
        self.models.unload()
        return self._runs(folder)

    def _runs(self, folder: Path) -> bool:
        try:
            with nullcontext() if self.next_jobs is None else self.pauses.timing():
                fresh = load_fresh(self.device, lambda: self._load(folder))
        except BenchmarkError as error:
            raise NotLoaded(f"transformers cannot read the checkpoint, so it is not published: {error}") from error
        model = fresh.loaded.model
        as_loaded = _content(model)
        if not self._passes(model):
            return False
        if self.next_jobs is not None and _content(model) == as_loaded:
            self.models.hold(self.next_jobs, fresh)
        return True

    def _passes(self, model: Any) -> bool:
        from qbatch.worker.measuring.speed.model_inputs import noise_inputs, one_token, reads_text

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

        model = self._load_alone(source)
        if not reads_text(model):
            return noise_inputs(model, 1), None
        inputs = one_token(model)
        fault = _fault(model, inputs)
        return inputs, None if fault is None else one_line(fault.error)

    def _explain(self, folder: Path, inputs: Inputs, scheme: Scheme) -> str:
        model = self._load_alone(folder)
        fault = _fault(model, inputs)
        return "it runs at the second attempt" if fault is None else fault.explain(model, inputs, scheme)


def _content(model: Any) -> tuple[object, ...]:
    """What differs if a pass has replaced weights: how much there is, and where it lies."""
    from qbatch.worker.measuring.speed.size import measure_size
    from qbatch.worker.methods.implementations import weights_of_model

    held = weights_of_model(model).held
    return measure_size(model), *(tensor.data_ptr() for each in model.parameters() for tensor in held(each))


def _fault(model: Any, inputs: Inputs) -> Any:
    """The first fault of a forward pass; None if it runs. Raises CudaOom, HostOom or DeviceError for those."""
    from qbatch.worker.runner.first_fault import find_first_fault

    fault = find_first_fault(model, inputs)
    of_device = None if fault is None else find_fault(fault.error)
    if of_device is not None and issubclass(of_device.kind, (CudaOom, HostOom, DeviceError)):
        raise of_device.kind(one_line(of_device.error)) from of_device.error
    return fault

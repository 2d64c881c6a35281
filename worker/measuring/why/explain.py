"""Find out what limits decoding on a GPU, and how much energy it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from qbatch.core.domain import DType, Protocol
from qbatch.core.errors import BenchmarkError, CudaOom, DeviceError, HostOom, JobError
from qbatch.core.measured.decode_figures import (
    DecodeReasons,
    DeviceRoofs,
    MeasuredEnergy,
    ProfiledStep,
    ReadByStep,
    StepAlone,
)
from qbatch.worker.measuring.speed.energy import NoEnergyCounter, measure_energy
from qbatch.worker.measuring.speed.generation import greedy
from qbatch.worker.measuring.speed.memory import nvml_handle
from qbatch.worker.measuring.speed.phases import Round
from qbatch.worker.measuring.why.decode_kernels import StepKernels, last_logits_only
from qbatch.worker.measuring.why.profile import StepProfile
from qbatch.worker.measuring.why.roofs import Roofs, measure_roofs
from qbatch.worker.measuring.why.traffic import StepWork, step_work
from qbatch.worker.measuring.why.verdict import judge
from qbatch.worker.models.load import LoadedModel, translated

T = TypeVar("T")


class Explanation:
    """Explains the eager decode steps of a causal LM on CUDA.

    Call ``observe`` while the model is loaded, and ``conclude`` once it is unloaded and its memory is free. Whatever
    fails is left out, with the reason in its place.
    """

    def __init__(self, protocol: Protocol, on_step: Callable[[str], None], *, is_alone: bool = True) -> None:
        """``is_alone``: no other model is loaded. If not, memory that runs out is no reason, but raised."""
        self._protocol = protocol
        self._is_alone = is_alone
        self._on_step = on_step
        self._work: StepWork | None = None
        self._energy = MeasuredEnergy()
        self._roofs: Roofs | None = None
        self._are_roofs_tried = False
        self._reason = None if protocol.why else "the protocol does not ask for an explanation"
        # The device is unusable for this process from then on. Earlier measurements remain valid.
        self.fault: DeviceError | None = None

    @property
    def energy(self) -> MeasuredEnergy:
        return self._energy

    def observe(self, loaded: LoadedModel, shape: Round) -> None:
        """Count a step's work at ``shape``, and if the protocol asks for energy, measure it, which takes 35 s.

        Raises CudaOom and HostOom if other models are loaded.
        """
        if self._protocol.why:
            self._work, self._reason = self._attempt("count a step's work", lambda: _work(loaded, shape.prompts))
        if self._protocol.energy:
            self._on_step("energy")
            energy, reason = self._attempt("measure energy", lambda: _energy(loaded, shape.prompts, shape.new_tokens))
            self._energy = MeasuredEnergy(reason=reason) if energy is None else energy

    def measure_roofs(self, device: str, compute_dtype: DType) -> None:
        """Measure what the device can do at best, if that was not tried. The memory of all models must be free."""
        if self._are_roofs_tried:
            return
        self._are_roofs_tried = True
        self._on_step("roofs")
        dtype = getattr(torch, compute_dtype.value)
        self._roofs, reason = self._attempt("measure the device's roofs", lambda: measure_roofs(device, dtype))
        self._reason = self._reason or reason

    def conclude(
        self, *, device: str, compute_dtype: DType, step_wall_s: float, kernels: StepKernels | None
    ) -> DecodeReasons:
        """The verdict on an eager step of ``step_wall_s`` seconds, with its evidence; ``kernels``: the step's."""
        profile = None if kernels is None else kernels.profile
        alone = None if kernels is None else kernels.alone
        if profile is not None:
            self.measure_roofs(device, compute_dtype)
        elif kernels is not None:
            self._reason = kernels.reason
        elif self.fault is not None:
            self._reason = str(self.fault)
        return replace(
            self._judged(device, step_wall_s, profile),
            step_wall_s=step_wall_s,
            roofs=_stored_roofs(self._roofs),
            kernels_alone=StepAlone() if alone is None else StepAlone(step_s=alone.step_s, reason=alone.reason),
            energy=self._energy,
        )

    def _judged(self, device: str, step_wall_s: float, profile: StepProfile | None) -> DecodeReasons:
        work, roofs = self._work, self._roofs
        if profile is None:
            return DecodeReasons(reason=self._reason)
        cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        verdict = None
        if roofs is not None and work is not None:
            verdict = judge(wall_s=step_wall_s, profile=profile, work=work, roofs=roofs, cache_size_bytes=cache_bytes)
            self._reason = "the weights fit in the GPU's cache" if verdict is None else None
        return DecodeReasons(
            verdict=verdict,
            reason=self._reason,
            profile=ProfiledStep(
                steps=profile.steps,
                device_busy_s=profile.device_busy_s,
                launches=profile.launches,
                synchronizations=profile.synchronizations,
            ),
            busy_share=profile.device_busy_s / step_wall_s,
            work=_stored_work(work),
            bytes_per_s=work.bytes / profile.device_busy_s if work and profile.device_busy_s else None,
        )

    def _attempt(self, doing: str, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """(the result of ``work``, None), or (None, why it failed). After a device fault, nothing more is tried."""
        if self.fault is not None:
            return None, str(self.fault)
        try:
            with translated(BenchmarkError, f"cannot {doing}"):
                return work(), None
        except JobError as error:
            if isinstance(error, CudaOom | HostOom) and not self._is_alone:
                raise
            reason = str(error)
            self.fault = error if isinstance(error, DeviceError) else None
        if self.fault is None:
            torch.cuda.empty_cache()
        return None, reason


def _stored_roofs(roofs: Roofs | None) -> DeviceRoofs:
    if roofs is None:
        return DeviceRoofs()
    return DeviceRoofs(
        copy_bytes_per_s=roofs.copy_bytes_per_s, matmul_flops_per_s=roofs.matmul_flops_per_s, dtype=roofs.dtype
    )


def _stored_work(work: StepWork | None) -> ReadByStep:
    if work is None:
        return ReadByStep()
    return ReadByStep(weight_bytes=work.weight_bytes, cache_bytes=work.cache_bytes, flops=work.flops)


@torch.inference_mode()
def _work(loaded: LoadedModel, prompts: torch.Tensor) -> StepWork:
    """The work of a step with the cache as it is after the prefill; decoding adds little to it."""
    output = loaded.model(input_ids=prompts, use_cache=True, **last_logits_only(loaded.model))
    cache = getattr(output, "past_key_values", None)
    return step_work(loaded.model, cache, batch_size=len(prompts))


def _energy(loaded: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> MeasuredEnergy:
    with nvml_handle(loaded.device) as handle:
        if handle is None:
            return MeasuredEnergy(reason="NVML does not list this GPU")
        # Where no speed is measured, nothing has generated yet, and what is loaded then takes seconds at some power.
        _generate(loaded, prompts, new_tokens)
        try:
            return measure_energy(
                handle,
                prefill=lambda: _generate(loaded, prompts, 1),
                generate=lambda: _generate(loaded, prompts, new_tokens),
                tokens=prompts.numel(),
                decoded=len(prompts) * (new_tokens - 1),
            )
        except NoEnergyCounter as error:
            return MeasuredEnergy(reason=str(error))


def _generate(loaded: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> None:
    model = loaded.model
    with torch.inference_mode(), greedy(model, new_tokens):
        model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=model.generation_config)
    torch.cuda.synchronize(loaded.device)

"""Measures a model at one shape, as the protocol asks: its speed in rounds, its memory, and what limits it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from qbatch.core.domain import Protocol
from qbatch.core.errors import DeviceError, JobError, Unsupported
from qbatch.core.measured.decode_figures import DecodeReasons
from qbatch.core.measured.known_speed import KnownSpeed, with_speed_of
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.speed_figures import Memory, Phase, RunShape, TimedRounds
from qbatch.worker.measuring.measurement_details import on_noise, under_protocol, without_parts
from qbatch.worker.measuring.model_benchmark import ModelBenchmark
from qbatch.worker.measuring.pooled_rounds import Speed, pool
from qbatch.worker.measuring.speed.generation import WarmedShapes
from qbatch.worker.measuring.speed.memory import (
    AllocatorPeaks,
    MemoryPeaks,
    allocator_peaks,
    memory_monitor,
    reset_allocator_peaks,
)
from qbatch.worker.measuring.speed.noise_forms import Inputs
from qbatch.worker.measuring.speed.phases import Round, noise_for, time_round, untimed_round
from qbatch.worker.measuring.why.decode_kernels import Shape, StepKernels
from qbatch.worker.measuring.why.explain import Explanation
from qbatch.worker.models.load import LoadedModel

_NOT_ANALYZED = "only the decoding of causal language models is analyzed"


class RowBenchmark:
    """Measures a model at one protocol's shape, in rounds. If its speed is ``known``, it is not timed.

    ``warmed``: the shapes at which other models of the same architecture have generated in this process.
    """

    def __init__(
        self,
        model: ModelBenchmark,
        protocol: Protocol,
        on_step: Callable[[str], None],
        *,
        known: KnownSpeed | None = None,
        warmed: WarmedShapes | None = None,
    ) -> None:
        self.model = model
        self._warmed = warmed or WarmedShapes()
        self._known = known
        self._protocol = protocol
        self._on_step = on_step
        self._rounds: list[Round] = []
        self._memory = Memory()
        self._why_no_speed: JobError | None = None
        self._why: Explanation | None = None
        # What was observed, if anything was.
        self._observed: Round | None = None
        self._device = "cpu"

    @property
    def rounds(self) -> int:
        """The number of rounds timed so far."""
        return len(self._rounds)

    @property
    def rounds_to_time(self) -> int:
        return self._protocol.speed_rounds if self._known is None else 0

    @property
    def wants_why(self) -> bool:
        return self._protocol.why and self._known is None

    @property
    def peak_bytes(self) -> int | None:
        """The most memory in use on the device in the first round, of a CPU's host; None before it."""
        return self._memory.max_reserved or self._memory.max_ram

    def give_up_speed(self, error: JobError) -> None:
        """Leave out the speed of this row from now on, and what was timed of it so far."""
        self._why_no_speed = error
        self._rounds.clear()

    def time(self, loaded: LoadedModel) -> None:
        """Time one round; during the first, also measure memory. Raises the errors of ``ModelBenchmark``."""
        if self._why_no_speed is not None:
            return
        self._on_step(f"speed, round {len(self._rounds) + 1}/{self.rounds_to_time}")
        self._device = loaded.device
        self.model.note_load_time(loaded)
        with self.model.subject.errors():
            try:
                self._time(loaded)
            except Unsupported as error:  # no input is known for it, which is no fault of a baseline either
                self.give_up_speed(error)

    def _time(self, loaded: LoadedModel) -> None:
        noise = noise_for(loaded, self._protocol)
        if self._rounds:
            self._rounds.append(self._round(loaded, nullcontext(), noise))
            return
        reset_allocator_peaks(loaded.device)
        with memory_monitor(loaded.device) as monitor:
            self._rounds.append(self._round(loaded, monitor, noise))
        self._memory = _stored_memory(monitor.peaks, allocator_peaks(loaded.device))

    def observe(self, loaded: LoadedModel, *, is_alone: bool = True) -> None:
        """Measure what limits a causal LM on a GPU, and its energy, if the protocol asks for them.

        Failures leave their reason in the row, and set ``fault`` if the device has become unusable. If the model is
        not alone on the device, memory that runs out is raised instead, as CudaOom or HostOom.
        """
        if self._why_no_speed is None and self.model.is_explainable and (self.wants_why or self._protocol.energy):
            self._why = Explanation(self._protocol, self._on_step, is_alone=is_alone)
            self._observed = self._rounds[0] if self._rounds else self._untimed_round(loaded)
            self._why.observe(loaded, self._observed)

    def _untimed_round(self, loaded: LoadedModel) -> Round:
        with self.model.subject.errors():
            return untimed_round(loaded, self._protocol, self.model.subject.eval_text)

    @property
    def fault(self) -> DeviceError | None:
        return None if self._why is None else self._why.fault

    def give_up_why(self, fault: DeviceError) -> None:
        """Analyze nothing more of this row: the device became unusable, maybe with another row."""
        if self._why is not None:
            self._why.fault = self._why.fault or fault

    @property
    def captured_shape(self) -> Shape | None:
        """The shape at which the kernels of a decode step should be measured; None if they should not be."""
        # What was timed may have been given up since it was observed.
        if self._why is None or self.fault is not None or not self.wants_why or not self._rounds:
            return None
        shape = self._rounds[0].shape
        return Shape(batch_size=shape.batch_size, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens)

    def measure_roofs(self, kernels: StepKernels) -> None:
        """Measure what the device can do at best, if the ``kernels`` are to be compared with it."""
        if self._why is not None and kernels.profile is not None:
            self._why.measure_roofs(self._device, self.model.subject.compute_dtype)

    def measurement(self, *, kernels: StepKernels | None, interleaved_with: Sequence[str]) -> Measurement:
        """All figures of the row.

        ``kernels``: those of ``captured_shape``, if it is not None. ``interleaved_with``: the ids of other models' jobs
        that were timed between this row's rounds.
        """
        if self._known is not None:
            return self._with_reasons(with_speed_of(self._untimed(), self._known))
        if not self._rounds:
            return self._with_reasons(self._untimed())
        speed = pool(self._rounds)
        measured = self.model.measured
        details = replace(
            measured.details,
            memory=self._memory,
            shapes=_with_shape(measured.details.shapes, self._rounds[0]),
            stats={Phase.LOAD_MODEL.value: self.model.load_times, **speed.stats},
            rounds=TimedRounds(
                count=len(self._rounds), interleaved_with=tuple(interleaved_with), phases=speed.by_round
            ),
            flags=speed.flags,
            why=self._explained(speed, kernels),
            audits=replace(measured.details.audits, spread_between_rounds=speed.notable_spread),
        )
        row = replace(
            measured,
            max_allocated_bytes=self._memory.max_allocated,
            prefill_s_p50=speed.prefill_s_p50,
            decode_tokens_per_s=speed.decode_tokens_per_s,
            per_token_s_p50=speed.per_token_s_p50,
            per_token_s_p99=speed.per_token_s_p99,
            forward_s_p50=speed.forward_s_p50,
            forward_samples_per_s=speed.forward_samples_per_s,
            details=details,
        )
        noise = self._rounds[0].noise
        return self._with_reasons(under_protocol(row if noise is None else on_noise(row, noise), self._protocol))

    def _with_reasons(self, row: Measurement) -> Measurement:
        """``row`` with why a part that was asked for is missing."""
        no_speed = None if self._why_no_speed is None else str(self._why_no_speed)
        not_analyzed = no_speed if self.model.is_explainable else _NOT_ANALYZED
        reasons = {
            MeasuredPart.SPEED: no_speed,
            MeasuredPart.QUALITY: self.model.why_no_quality,
            MeasuredPart.WHY: not_analyzed,
            MeasuredPart.ENERGY: not_analyzed,
        }
        known = {part: reason for part, reason in reasons.items() if reason is not None}
        missing = {part: reason for part, reason in known.items() if part in self._protocol.parts}
        may_pass = self.model.may_pass or any(one.may_pass for one in (self._why_no_speed, self.fault) if one)
        return without_parts(row, missing, may_pass=may_pass)

    def _untimed(self) -> Measurement:
        """The figures of a row whose speed is not measured."""
        measured = self.model.measured
        details = replace(
            measured.details,
            stats={Phase.LOAD_MODEL.value: self.model.load_times},
            shapes=_with_shape(measured.details.shapes, self._observed),
            why=DecodeReasons() if self._why is None else DecodeReasons(energy=self._why.energy),
        )
        return under_protocol(replace(measured, details=details), self._protocol)

    def _round(self, loaded: LoadedModel, during_warmup: AbstractContextManager[object], noise: Inputs | None) -> Round:
        text = self.model.subject.eval_text
        return time_round(loaded, self._protocol, text, during_warmup, self._warmed, noise)

    def _explained(self, speed: Speed, kernels: StepKernels | None) -> DecodeReasons:
        """The explanation. Empty if none was requested, and without a GPU or decoding."""
        if self._why is None or speed.per_token_s_p50 is None:
            return DecodeReasons()
        return self._why.conclude(
            device=self._device,
            compute_dtype=self.model.subject.compute_dtype,
            step_wall_s=speed.per_token_s_p50,
            kernels=kernels,
        )


def _with_shape(text_shape: RunShape, of: Round | None) -> RunShape:
    if of is None:
        return text_shape
    shape = of.shape
    return replace(
        text_shape, batch_size=shape.batch_size, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens
    )


def _stored_memory(peaks: MemoryPeaks, allocator: AllocatorPeaks) -> Memory:
    return Memory(
        max_ram=peaks.max_ram,
        max_global_vram=peaks.max_global_vram,
        max_process_vram=peaks.max_process_vram,
        max_allocated=allocator.allocated,
        max_reserved=allocator.reserved,
    )

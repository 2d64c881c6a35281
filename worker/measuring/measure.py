"""Measure a model: its size and quality once, and for each shape its speed in rounds, its memory, and what limits it.

Size comes first, since a forward pass may repack weights. The protocol says which of these parts are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from qbatch.core.domain import DType, Protocol
from qbatch.core.errors import BenchmarkError, DeviceError, Unsupported
from qbatch.core.measured.checkpoint_audit import MeasuringAudit
from qbatch.core.measured.decode_figures import DecodeReasons
from qbatch.core.measured.details import Details
from qbatch.core.measured.known_speed import KnownSpeed, with_speed_of
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.quality_figures import FurtherText, Quality, TextPerplexity
from qbatch.core.measured.speed_figures import Memory, Phase, PhaseTimes, RunShape, Size, TimedRounds
from qbatch.worker.machine.cpu_arithmetic import arithmetic_slowdowns
from qbatch.worker.measuring.pooled_rounds import Speed, pool
from qbatch.worker.measuring.quality.lm_eval_tasks import LoadedTasks, load_tasks, run_tasks
from qbatch.worker.measuring.quality.perplexity import TextScore, score_text, text_windows
from qbatch.worker.measuring.quality.reference import Reference, compare
from qbatch.worker.measuring.speed.memory import (
    AllocatorPeaks,
    MemoryPeaks,
    allocator_peaks,
    memory_monitor,
    reset_allocator_peaks,
)
from qbatch.worker.measuring.speed.model_inputs import reads_text
from qbatch.worker.measuring.speed.phases import Round, time_round, untimed_round
from qbatch.worker.measuring.speed.size import ModelSize, adapter_disk_bytes, disk_bytes, measure_size
from qbatch.worker.measuring.stats import summarize
from qbatch.worker.measuring.tokens import text_cut
from qbatch.worker.measuring.unloaded_size import count_unloaded
from qbatch.worker.measuring.versions import device_name, versions
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape, StepKernels
from qbatch.worker.measuring.why.explain import Explanation
from qbatch.worker.methods.implementations import weights_of_model
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model in ``folder``, perhaps with the ``adapter`` in another, and how it is measured.

    ``dtype`` and ``compute_dtype`` are resolved. Of ``protocol`` only fields that do not depend on the shape are used.
    ``texts``: its further texts and packed tasks by their sha256. ``on_step``: called with the name of each step.
    """

    folder: Path
    dtype: DType
    compute_dtype: DType
    protocol: Protocol
    eval_text: str
    texts: Mapping[str, str]
    on_step: Callable[[str], None]
    adapter: Path | None = None

    def errors(self) -> AbstractContextManager[None]:
        return translated(BenchmarkError, f"cannot measure {self.folder.name}")


class ModelBenchmark:
    """Measures what does not depend on the shape, once for a model.

    Call ``prepare`` when the model is freshly loaded, and ``measure_quality`` after its first round. Both raise
    BenchmarkError, Unsupported, UnsafeSource, FetchError, CudaOom, HostOom, DeviceError or StorageError.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.is_explainable = False
        # Why the quality of the model cannot be measured; None if it can.
        self.why_no_quality: str | None = None
        self._not_captured: str | None = None
        # All figures except those of a single row.
        self._measured: Measurement | None = None
        self._loads_s: list[float] = []
        self._tasks = LoadedTasks(hashes={})

    @property
    def measured(self) -> Measurement:
        """The figures known so far. Raises BenchmarkError before ``prepare``."""
        if self._measured is None:
            raise BenchmarkError(f"{self.subject.folder.name} must be counted before it is measured")
        return self._measured

    def note_not_compared(self, reason: str, *, text: str | None = None) -> None:
        """Record why the model is not compared with its base, on the further ``text`` of that name or on the first."""
        details = self.measured.details
        if text is None:
            details = replace(details, quality=Quality(reason=reason))
        else:
            further = replace((details.more_texts or {}).get(text, FurtherText()), quality=Quality(reason=reason))
            details = replace(details, more_texts={**(details.more_texts or {}), text: further})
        self._measured = replace(self.measured, details=details)

    def give_up_quality(self, reason: str) -> None:
        self.why_no_quality = reason

    def prepare(self, loaded: LoadedModel) -> None:
        """Count the model, and load its tasks, so that every row includes their memory."""
        with self.subject.errors():
            self._prepare(loaded)
            self.note_load_time(loaded)

    def measure_quality(
        self, loaded: LoadedModel, reference: Reference | None, more: Mapping[str, Reference] = MappingProxyType({})
    ) -> None:
        """Measure quality, compared with ``reference`` if there is one. ``more``: those of further texts, by name."""
        with self.subject.errors():
            self._measure_quality(loaded, reference, more)

    def kernels_request(self, shapes: Sequence[Shape], *, device: str, trusted: bool = False) -> KernelsRequest:
        """The request for the kernels of a decode step at ``shapes``."""
        return KernelsRequest(
            folder=str(self.subject.folder),
            adapter=None if self.subject.adapter is None else str(self.subject.adapter),
            dtype=self.subject.dtype.value,
            device=device,
            trusted=trusted,
            shapes=tuple(shapes),
            not_captured=self._not_captured,
        )

    def note_load_time(self, loaded: LoadedModel) -> None:
        """Record how long the model took to load, once for each time that it is loaded."""
        if self._loads_s[-1:] != [loaded.load_model_s]:
            self._loads_s.append(loaded.load_model_s)

    @property
    def load_times(self) -> PhaseTimes:
        return summarize(self._loads_s).as_times()

    def _prepare(self, loaded: LoadedModel) -> None:
        if not reads_text(loaded.model):
            takes = loaded.model.main_input_name
            what = (
                f"takes {takes}, not text" if takes != "input_ids" else "takes text only together with something else"
            )
            self.why_no_quality = f"{type(loaded.model).__name__} {what}"
        subject = self.subject
        self._tasks = load_tasks(loaded, subject.protocol, subject.texts)
        is_language_model = loaded.task is ModelKind.CAUSAL_LM and self.why_no_quality is None
        self.is_explainable = is_language_model and loaded.device.startswith("cuda")
        weights, size = weights_of_model(loaded.model), measure_size(loaded.model)
        self._not_captured = weights.why_not_captured(loaded.model)
        details = Details(
            task=loaded.task.value,
            versions=versions(*weights.libraries),
            size=_stored_size(size),
            arithmetic_slowdown=arithmetic_slowdowns(loaded.device, (subject.dtype, subject.compute_dtype)),
            shapes=self._text_shape(loaded),
            audits=MeasuringAudit(cpu_layers_on_generic_kernel=weights.prepare(loaded.model, loaded.device)),
        )
        sized = _sized(subject, size, device_name=device_name(loaded.device), details=details)
        self._measured = replace(sized, load_model_s=loaded.load_model_s)

    def _text_shape(self, loaded: LoadedModel) -> RunShape:
        if loaded.tokenizer is None:
            return RunShape()
        cut = text_cut(loaded, self.subject.protocol)
        return RunShape(eval_window=cut.window, eval_stride=cut.stride, eval_max_windows=cut.count)

    def _measure_quality(self, loaded: LoadedModel, reference: Reference | None, more: Mapping[str, Reference]) -> None:
        subject = self.subject
        score, quality = self._compare_and_score(loaded, reference, subject.protocol, subject.eval_text)
        more_texts = {
            text.name: self._further(loaded, more.get(text.name), subject.protocol.on_text(text), text.sha256)
            for text in subject.protocol.more_texts
        }
        if self._tasks.tasks is not None:
            self.subject.on_step("tasks")
        answered = run_tasks(self._tasks, loaded, self.subject.protocol, self.subject.on_step)
        perplexity = None if score is None else score.perplexity
        measured = self.measured
        self._measured = replace(
            measured,
            perplexity=finite(perplexity),
            kl_mean=finite(quality.kl_mean),
            top1_agreement=finite(quality.top1_agreement),
            answers=None if answered is None else answered.answers,
            details=replace(
                measured.details,
                perplexity=_stored_score(score, loaded),
                quality=quality,
                more_texts=more_texts or None,
                tasks=None if answered is None else answered.scores,
                tasks_reason=self._tasks.reason,
                audits=replace(
                    measured.details.audits,
                    perplexity_not_finite=perplexity is not None and not math.isfinite(perplexity),
                ),
            ),
        )
        self._tasks = LoadedTasks(hashes={})

    def _further(
        self, loaded: LoadedModel, reference: Reference | None, protocol: Protocol, sha256: str
    ) -> FurtherText:
        score, quality = self._compare_and_score(loaded, reference, protocol, self.subject.texts[sha256])
        return FurtherText(quality=quality, perplexity=_stored_score(score, loaded))

    def _compare_and_score(
        self, loaded: LoadedModel, reference: Reference | None, protocol: Protocol, text: str
    ) -> tuple[TextScore | None, Quality]:
        """(the score of ``text``, for causal LMs only; the comparison with the base)."""
        on_step = self.subject.on_step
        against_base = Quality()
        if reference is not None:
            on_step("quality")
            against_base = _compare(
                loaded, reference, protocol, text, lambda number, count: on_step(f"quality {number}/{count}")
            )
        # Perplexity is meaningless for other tasks, and for random ids instead of a text.
        if loaded.task is not ModelKind.CAUSAL_LM or loaded.tokenizer is None:
            return None, against_base
        cut = text_windows(loaded, protocol, text)
        nll, tokens = against_base.window_nll, against_base.window_tokens
        if nll is not None and tokens is not None and len(nll) == len(cut):
            # The comparison has already scored the same windows.
            return TextScore(window_nll=nll, window_tokens=tokens), against_base
        return score_text(loaded, cut, lambda number: on_step(f"perplexity {number}/{len(cut)}")), against_base


class RowBenchmark:
    """Measures a model at one protocol's shape, in rounds. If its speed is ``known``, it is not timed."""

    def __init__(
        self,
        model: ModelBenchmark,
        protocol: Protocol,
        on_step: Callable[[str], None],
        *,
        known: KnownSpeed | None = None,
    ) -> None:
        self.model = model
        self._known = known
        self._protocol = protocol
        self._on_step = on_step
        self._rounds: list[Round] = []
        self._memory = Memory()
        self._why_no_speed: str | None = None
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

    def give_up_speed(self, reason: str) -> None:
        """Leave out the speed of this row from now on, and what was timed of it so far."""
        self._why_no_speed = reason
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
                self.give_up_speed(str(error))

    def _time(self, loaded: LoadedModel) -> None:
        if self._rounds:
            self._rounds.append(self._round(loaded, nullcontext()))
            return
        reset_allocator_peaks(loaded.device)
        with memory_monitor(loaded.device) as monitor:
            self._rounds.append(self._round(loaded, monitor))
        self._memory = _stored_memory(monitor.peaks, allocator_peaks(loaded.device))

    def observe(self, loaded: LoadedModel) -> None:
        """Measure what limits a causal LM on a GPU, and its energy, if the protocol asks for them.

        Failures leave their reason in the row, and set ``fault`` if the device has become unusable.
        """
        if self._why_no_speed is None and self.model.is_explainable and (self.wants_why or self._protocol.energy):
            self._why = Explanation(self._protocol, self._on_step)
            self._observed = self._rounds[0] if self._rounds else self._untimed_round(loaded)
            self._why.observe(loaded, self._observed)

    def _untimed_round(self, loaded: LoadedModel) -> Round:
        with self.model.subject.errors():
            return untimed_round(loaded, self._protocol, self.model.subject.eval_text)

    @property
    def fault(self) -> DeviceError | None:
        return None if self._why is None else self._why.fault

    @property
    def captured_shape(self) -> Shape | None:
        """The shape at which the kernels of a decode step should be measured; None if they should not be."""
        if self._why is None or self.fault is not None or not self.wants_why:
            return None
        shape = self._rounds[0].shape
        return Shape(batch_size=shape.batch_size, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens)

    def measurement(self, *, kernels: StepKernels | None, interleaved_with: Sequence[str]) -> Measurement:
        """All figures of the row.

        ``kernels``: those of ``captured_shape``, if it is not None. ``interleaved_with``: the ids of other models' jobs
        that were timed between this row's rounds.
        """
        if self._known is not None:
            return with_speed_of(self._untimed(), self._known)
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
        reasons = {MeasuredPart.SPEED: self._why_no_speed, MeasuredPart.QUALITY: self.model.why_no_quality}
        known = {part: reason for part, reason in reasons.items() if reason is not None}
        return without_parts(row, {part: reason for part, reason in known.items() if part in self._protocol.parts})

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

    def _round(self, loaded: LoadedModel, during_warmup: AbstractContextManager[object]) -> Round:
        return time_round(loaded, self._protocol, self.model.subject.eval_text, during_warmup)

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


def counted(subject: Subject, *, trusted: bool) -> Measurement:
    """The figures of a model that is not loaded: its size. Raises SourceCorrupt, UnsafeSource or Unsupported."""
    unloaded = count_unloaded(subject.folder, subject.dtype, trusted=trusted, adapter=subject.adapter)
    return under_protocol(
        _sized(
            subject,
            unloaded.size,
            device_name="",
            details=Details(
                task=unloaded.task, versions=versions(*unloaded.libraries), size=_stored_size(unloaded.size)
            ),
        ),
        subject.protocol,
    )


def _sized(subject: Subject, size: ModelSize, *, device_name: str, details: Details) -> Measurement:
    return Measurement(
        device_name=device_name,
        dtype=subject.dtype,
        compute_dtype=subject.compute_dtype,
        num_parameters=size.num_parameters,
        quantized_fraction=size.quantized_fraction,
        bits_per_param=size.bits_per_param,
        disk_bytes=disk_bytes(subject.folder) + adapter_disk_bytes(subject.adapter),
        memory_footprint_bytes=size.memory_footprint_bytes,
        weights_bytes=size.weights_bytes,
        details=details,
    )


def _with_shape(text_shape: RunShape, of: Round | None) -> RunShape:
    if of is None:
        return text_shape
    shape = of.shape
    return replace(
        text_shape, batch_size=shape.batch_size, prompt_tokens=shape.prompt_tokens, new_tokens=shape.new_tokens
    )


def on_noise(row: Measurement, inputs: str) -> Measurement:
    """``row`` without the figures that are compared: the speed on noise is not the speed in use."""
    details = replace(row.details, noise_inputs=inputs)
    return replace(row, forward_s_p50=None, forward_samples_per_s=None, max_allocated_bytes=None, details=details)


def without_parts(row: Measurement, reasons: Mapping[MeasuredPart, str]) -> Measurement:
    """``row`` with the ``reasons`` why parts are missing."""
    if not reasons:
        return row
    stored = {part.value: reason for part, reason in reasons.items()}
    return replace(row, details=replace(row.details, not_measured=stored))


def under_protocol(measurement: Measurement, protocol: Protocol) -> Measurement:
    """``row`` with the protocol by which it was measured."""
    details = replace(measurement.details, protocol=protocol.to_json(), protocol_hash=protocol.hash)
    return replace(measurement, details=details)


def finite(value: float | None) -> float | None:
    """``value``, or None if it is infinite or NaN, since columns store neither."""
    return value if value is not None and math.isfinite(value) else None


def _compare(
    loaded: LoadedModel, reference: Reference, protocol: Protocol, text: str, on_probe: Callable[[int, int], None]
) -> Quality:
    """Compare with the base. If that fails, the result has only the reason, and the other figures are kept."""
    try:
        with translated(BenchmarkError, "cannot compare with the base"):
            return compare(loaded, reference, protocol, text, on_probe)
    except BenchmarkError as error:
        return Quality(reason=str(error))


def _why_no_score(loaded: LoadedModel) -> str | None:
    """Why a causal language model has no perplexity; None for models that never have one."""
    if loaded.task is not ModelKind.CAUSAL_LM:
        return None
    return loaded.why_no_tokenizer or "the evaluation text is too short: it has no token that can be scored"


def _stored_size(size: ModelSize) -> Size:
    return Size(
        num_parameters=size.num_parameters,
        quantized_parameters=size.quantized_parameters,
        weights_bytes=size.weights_bytes,
        quant_state_bytes=size.quant_state_bytes,
        buffer_bytes=size.buffer_bytes,
        memory_footprint_bytes=size.memory_footprint_bytes,
    )


def _stored_score(score: TextScore | None, loaded: LoadedModel) -> TextPerplexity:
    if score is None:
        return TextPerplexity(reason=_why_no_score(loaded))
    return TextPerplexity(
        mean_nll=score.mean_nll,
        perplexity_se=score.perplexity_se,
        tokens=score.tokens,
        windows=len(score.window_nll),
        window_nll=score.window_nll,
        window_tokens=score.window_tokens,
    )


def _stored_memory(peaks: MemoryPeaks, allocator: AllocatorPeaks) -> Memory:
    return Memory(
        max_ram=peaks.max_ram,
        max_global_vram=peaks.max_global_vram,
        max_process_vram=peaks.max_process_vram,
        max_allocated=allocator.allocated,
        max_reserved=allocator.reserved,
    )

"""What is measured of a model: once its size and quality, and for each shape its speed, in rounds, its memory, and why.

Size comes first, since a forward may repack weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qbatch.core.domain import DType, Measurement, Protocol
from qbatch.core.errors import BenchmarkError, DeviceError, Unsupported
from qbatch.worker.measuring.pooled_rounds import Speed, pool
from qbatch.worker.measuring.quality.lm_eval_tasks import LoadedTasks, load_tasks, run_tasks
from qbatch.worker.measuring.quality.perplexity import TextScore, score_text, text_windows
from qbatch.worker.measuring.quality.reference import Reference, compare
from qbatch.worker.measuring.speed.memory import allocator_peaks, reset_allocator_peaks, watching
from qbatch.worker.measuring.speed.phases import Round, time_round
from qbatch.worker.measuring.speed.size import disk_bytes, measure_size
from qbatch.worker.measuring.stats import summarize
from qbatch.worker.measuring.tokens import text_cut
from qbatch.worker.measuring.versions import device_name, versions
from qbatch.worker.measuring.why.decode_kernels import Shape, StepKernels
from qbatch.worker.measuring.why.explain import Explanation
from qbatch.worker.methods.halves import weights_of_model
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model in ``folder``, and by which rules it is measured. ``dtype`` and ``compute_dtype`` are resolved; of
    ``protocol`` only what does not depend on the shape counts. ``task_texts`` are its packed tasks by their sha256."""

    folder: Path
    dtype: DType
    compute_dtype: DType
    protocol: Protocol
    eval_text: str
    task_texts: Mapping[str, str]
    on_step: Callable[[str], None]

    def errors(self) -> AbstractContextManager[None]:
        return translated(BenchmarkError, f"cannot measure {self.folder.name}")


class ModelBenchmark:
    """What is measured of a model once, whatever shapes it is timed at. ``begin`` wants it freshly loaded, ``judge``
    is for after the first times. Both raise BenchmarkError, Unsupported, UnsafeSource, FetchError, CudaOom, HostOom,
    DeviceError or StorageError."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.columns: dict[str, Any] = {}
        self.details: dict[str, Any] = {}
        self.audits: dict[str, Any] = {}
        self.text_shape: dict[str, int] = {}
        self.is_explainable = False
        self._loads_s: list[float] = []
        self._tasks = LoadedTasks(hashes={})

    def begin(self, loaded: LoadedModel) -> None:
        """Count the model, and load its tasks, so that their memory is in every row alike."""
        with self.subject.errors():
            self._begin(loaded)

    def judge(self, loaded: LoadedModel, reference: Reference | None) -> None:
        """Measure its quality, beside its base's ``reference`` where there is one."""
        with self.subject.errors():
            self._judge(loaded, reference)

    def see(self, loaded: LoadedModel) -> None:
        """Note how long it took to load: once, however often it is timed until it is loaded again."""
        if self._loads_s[-1:] != [loaded.load_model_s]:
            self._loads_s.append(loaded.load_model_s)

    @property
    def load_stats(self) -> dict[str, Any]:
        return asdict(summarize(self._loads_s))

    def _begin(self, loaded: LoadedModel) -> None:
        if loaded.model.main_input_name != "input_ids":
            raise Unsupported(f"{type(loaded.model).__name__} reads {loaded.model.main_input_name}, not text")
        subject = self.subject
        self._tasks = load_tasks(loaded, subject.protocol, subject.task_texts)
        self.is_explainable = loaded.task is ModelKind.CAUSAL_LM and loaded.device.startswith("cuda")
        weights, size = weights_of_model(loaded.model), measure_size(loaded.model)
        self.columns |= {
            "device_name": device_name(loaded.device),
            "dtype": subject.dtype,
            "compute_dtype": subject.compute_dtype,
            "num_parameters": size.num_parameters,
            "quantized_fraction": size.quantized_fraction,
            "bits_per_param": size.bits_per_param,
            "disk_bytes": disk_bytes(subject.folder),
            "memory_footprint_bytes": size.memory_footprint_bytes,
            "weights_bytes": size.weights_bytes,
            "load_model_s": loaded.load_model_s,
        }
        self.details |= {"task": loaded.task.value, "versions": versions(*weights.libraries), "size": asdict(size)}
        if loaded.tokenizer is not None:
            cut = text_cut(loaded, subject.protocol)
            self.text_shape = {"eval_window": cut.window, "eval_stride": cut.stride, "eval_max_windows": cut.count}
        self.audits["cpu_layers_on_generic_kernel"] = weights.prepare(loaded.model, loaded.device)

    def _judge(self, loaded: LoadedModel, reference: Reference | None) -> None:
        score, against_base = self._compare_and_score(loaded, reference)
        if self._tasks.tasks is not None:
            self.subject.on_step("tasks")
        found = run_tasks(self._tasks, loaded, self.subject.protocol)
        perplexity = None if score is None else score.perplexity
        figures = against_base or {}
        self.columns |= {
            "perplexity": finite(perplexity),
            "kl_mean": finite(figures.get("kl_mean")),
            "top1_agreement": finite(figures.get("top1_agreement")),
        }
        self.details |= {
            "perplexity": finite(None if score is None else _score_details(score)),
            "quality": finite(against_base),
            "tasks": finite(found),
            "tasks_reason": self._tasks.reason,
        }
        self.audits["perplexity_not_finite"] = perplexity is not None and not math.isfinite(perplexity)
        self._tasks = LoadedTasks(hashes={})

    def _compare_and_score(
        self, loaded: LoadedModel, reference: Reference | None
    ) -> tuple[TextScore | None, dict[str, Any] | None]:
        """The score is a causal LM's alone."""
        protocol, text, on_step = self.subject.protocol, self.subject.eval_text, self.subject.on_step
        against_base = None
        if reference is not None:
            on_step("quality")
            against_base = _compare(loaded, reference, protocol, text)
        # Perplexity has no meaning for other tasks, nor over random ids in place of a text.
        if loaded.task is not ModelKind.CAUSAL_LM or loaded.tokenizer is None:
            return None, against_base
        cut = text_windows(loaded, protocol, text)
        if against_base is not None and len(against_base.get("window_nll", ())) == len(cut):
            # The comparison has scored the same windows.
            nll, tokens = against_base["window_nll"], against_base["window_tokens"]
            return TextScore(window_nll=tuple(nll), window_tokens=tuple(tokens)), against_base
        return score_text(loaded, cut, lambda number: on_step(f"perplexity {number}/{len(cut)}")), against_base


class RowBenchmark:
    """What is measured of a model at one protocol's shape, round by round."""

    def __init__(self, model: ModelBenchmark, protocol: Protocol, on_step: Callable[[str], None]) -> None:
        self._model = model
        self._protocol = protocol
        self._on_step = on_step
        self._rounds: list[Round] = []
        self._memory: dict[str, Any] = {}
        self._why: Explanation | None = None
        self._device = "cpu"

    @property
    def rounds(self) -> int:
        """How many were timed."""
        return len(self._rounds)

    def time(self, loaded: LoadedModel) -> None:
        """Time one round, and in the first one watch the memory. Raises as ``ModelBenchmark`` does."""
        self._on_step("speed")
        self._device = loaded.device
        self._model.see(loaded)
        with self._model.subject.errors():
            if self._rounds:
                self._rounds.append(self._round(loaded, nullcontext()))
                return
            reset_allocator_peaks(loaded.device)
            with watching(loaded.device) as watch:
                self._rounds.append(self._round(loaded, watch))
            self._memory = asdict(watch.peaks) | allocator_peaks(loaded.device)

    def observe(self, loaded: LoadedModel) -> None:
        """Look behind the times of a causal LM on a GPU, as far as the protocol asks. What goes wrong leaves its reason
        in the row, and where it spoilt the device, ``fault``."""
        if self._model.is_explainable and (self._protocol.why or self._protocol.energy):
            self._why = Explanation(self._protocol, self._on_step)
            self._why.observe(loaded, self._rounds[0])

    @property
    def fault(self) -> DeviceError | None:
        return None if self._why is None else self._why.fault

    @property
    def captured_shape(self) -> Shape | None:
        """The shape at which a decode step's kernels are to be measured, where they are."""
        if self._why is None or self.fault is not None or not self._protocol.why:
            return None
        return Shape(**self._rounds[0].shapes)

    def measurement(self, *, kernels: StepKernels | None, interleaved_with: Sequence[str]) -> Measurement:
        """The row, after at least one round. ``kernels`` are its own, where they were asked for;
        ``interleaved_with`` names the jobs of other models that were timed between its rounds."""
        speed = pool(self._rounds)
        columns: dict[str, Any] = {**self._model.columns, **speed.columns}
        return Measurement(
            **columns,
            max_allocated_bytes=self._memory["max_allocated"],
            details={
                **self._model.details,
                "protocol": self._protocol.to_json(),
                "protocol_hash": self._protocol.hash,
                "memory": self._memory,
                "shapes": {**speed.shapes, **self._model.text_shape},
                "stats": {"load_model": self._model.load_stats, **speed.stats},
                "rounds": {
                    "count": len(self._rounds),
                    "interleaved_with": list(interleaved_with),
                    "phases": speed.by_round,
                },
                "flags": speed.flags,
                "why": finite(self._explained(speed, kernels)),
                "audits": self._model.audits | {"spread_between_rounds": speed.notable_spread},
            },
        )

    def _round(self, loaded: LoadedModel, during_warmup: AbstractContextManager[object]) -> Round:
        return time_round(loaded, self._protocol, self._model.subject.eval_text, during_warmup)

    def _explained(self, speed: Speed, kernels: StepKernels | None) -> dict[str, Any] | None:
        """None where it was not asked for, and where there is nothing to explain: no GPU, or no decoding."""
        if self._why is None:
            return None
        return self._why.conclude(
            device=self._device,
            compute_dtype=self._model.subject.compute_dtype,
            step_wall_s=speed.columns["per_token_s_p50"],
            kernels=kernels,
        )


def finite(value: Any) -> Any:
    """``value`` with every infinity and not-a-number in it replaced by None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _compare(loaded: LoadedModel, reference: Reference, protocol: Protocol, text: str) -> dict[str, Any]:
    """What cannot be compared leaves its reason, and the other figures stand."""
    try:
        with translated(BenchmarkError, "cannot compare with the base"):
            return compare(loaded, reference, protocol, text)
    except BenchmarkError as error:
        return {"reason": str(error)}


def _score_details(score: TextScore) -> dict[str, Any]:
    return {
        "mean_nll": score.mean_nll,
        "perplexity_se": score.perplexity_se,
        "tokens": score.tokens,
        "windows": len(score.window_nll),
        "window_nll": list(score.window_nll),
        "window_tokens": list(score.window_tokens),
    }

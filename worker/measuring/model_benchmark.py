"""Measures what does not depend on the shape of a run, once for a model: its size and its quality.

The size comes first, since a forward pass may repack weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from qbatch.core.domain import Protocol, TextRef
from qbatch.core.errors import BenchmarkError, JobError, UnsafeSource, Unsupported
from qbatch.core.exponential import exponential
from qbatch.core.measured.checkpoint_audit import MeasuringAudit
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.measured.quality_figures import FurtherText, Quality, TextPerplexity
from qbatch.core.measured.speed_figures import PhaseTimes, RunShape
from qbatch.worker.machine.cpu_arithmetic import arithmetic_slowdowns
from qbatch.worker.measuring.quality.lm_eval_tasks import LoadedTasks, TaskRun, load_tasks, run_tasks
from qbatch.worker.measuring.quality.perplexity import TextScore, WindowScores, score_text, text_windows
from qbatch.worker.measuring.quality.reference import Reference, compare
from qbatch.worker.measuring.speed.model_inputs import reads_text
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.stats import summarize
from qbatch.worker.measuring.subject import Subject, stored_size, with_size
from qbatch.worker.measuring.tokens import text_cut
from qbatch.worker.measuring.versions import device_name, versions
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape
from qbatch.worker.methods.implementations import weights_of_model
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import LoadedModel, translated

log = logging.getLogger("qbatch.runner")

# Of tasks. A hub that cannot be reached is asked again, and what befell the device or the host is no fault of tasks.
_TASK_ERRORS = (BenchmarkError, Unsupported, UnsafeSource)


class ModelBenchmark:
    """Measures what does not depend on the shape, once for a model.

    Call ``prepare`` when the model is freshly loaded, and ``measure_quality`` after a round. Both raise
    BenchmarkError, Unsupported, CudaOom, HostOom, DeviceError or StorageError, and ``prepare`` FetchError. Tasks and
    further texts that fail leave only their reason.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.is_explainable = False
        # Why the quality of the model cannot be measured; None if it can.
        self.why_no_quality: str | None = None
        # Why the model cannot read the first text, if it cannot: its perplexity is missing then.
        self.unread_text: BenchmarkError | None = None
        # Whether some of it is missing for a reason that may pass.
        self.may_pass = False
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
        details, quality = self.measured.details, Quality(reason=reason)
        if text is None:
            self._measured = replace(self.measured, details=replace(details, quality=quality))
        else:
            self._note_text(text, replace((details.more_texts or {}).get(text, FurtherText()), quality=quality))

    def _note_text(self, name: str, figures: FurtherText) -> None:
        details = self.measured.details
        details = replace(details, more_texts={**(details.more_texts or {}), name: figures})
        self._measured = replace(self.measured, details=details)

    def give_up_quality(self, error: JobError) -> None:
        self.why_no_quality = self._missing(error)

    def _missing(self, error: JobError) -> str:
        """The reason why a part is missing."""
        self.may_pass = self.may_pass or error.may_pass
        return str(error)

    def prepare(self, loaded: LoadedModel) -> None:
        """Count the model, and load its tasks, so that every row includes their memory."""
        with self.subject.errors():
            self._prepare(loaded)
            self.note_load_time(loaded)

    def measure_quality(
        self,
        loaded: LoadedModel,
        reference: Reference | None,
        more: Mapping[str, Reference] = MappingProxyType({}),
        *,
        scores: Mapping[str, WindowScores] = MappingProxyType({}),
    ) -> None:
        """Measure quality, compared with ``reference`` if there is one. ``more``: those of further texts, by name.
        ``scores``: the windows that are scored already, by the sha256 of their text."""
        with self.subject.errors():
            self._measure_quality(loaded, reference, more, scores)

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
        self._tasks = self._loaded_tasks(loaded)
        is_language_model = loaded.kind is ModelKind.CAUSAL_LM and self.why_no_quality is None
        self.is_explainable = is_language_model and loaded.device.startswith("cuda")
        weights, size = weights_of_model(loaded.model), measure_size(loaded.model)
        self._not_captured = weights.why_not_captured(loaded.model)
        details = Details(
            task=loaded.kind.value,
            versions=versions(*weights.libraries),
            size=stored_size(size),
            arithmetic_slowdown=arithmetic_slowdowns(loaded.device, (subject.dtype, subject.compute_dtype)),
            shapes=self._text_shape(loaded),
            audits=MeasuringAudit(cpu_layers_on_generic_kernel=weights.prepare(loaded.model, loaded.device)),
        )
        sized = with_size(subject, size, device_name=device_name(loaded.device), details=details)
        self._measured = replace(sized, load_model_s=loaded.load_model_s)

    def _text_shape(self, loaded: LoadedModel) -> RunShape:
        if loaded.tokenizer is None:
            return RunShape()
        cut = text_cut(loaded, self.subject.protocol)
        return RunShape(eval_window=cut.window, eval_stride=cut.stride, eval_max_windows=cut.count)

    def _measure_quality(
        self,
        loaded: LoadedModel,
        reference: Reference | None,
        more: Mapping[str, Reference],
        scores: Mapping[str, WindowScores],
    ) -> None:
        subject = self.subject
        quality = self._compared(loaded, reference, subject.protocol, subject.eval_text)
        try:
            text = self._scored(loaded, subject.protocol, subject.eval_text, quality, scores)
        except BenchmarkError as error:
            # It is of the text: what a library raises is not translated yet, and is the model's own failure.
            self.unread_text = error
            text = TextPerplexity(reason=str(error))
        perplexity = None if text.mean_nll is None else exponential(text.mean_nll)
        measured = self.measured
        self._measured = replace(
            measured,
            perplexity=_finite(perplexity),
            kl_mean=_finite(quality.kl_mean),
            top1_agreement=_finite(quality.top1_agreement),
            details=replace(
                measured.details,
                perplexity=text,
                quality=quality,
                audits=replace(
                    measured.details.audits,
                    perplexity_not_finite=perplexity is not None and not math.isfinite(perplexity),
                ),
            ),
        )
        for further in subject.protocol.more_texts:
            self._note_text(further.name, self._further(loaded, further, more.get(further.name), scores))
        self._measure_tasks(loaded)

    def _loaded_tasks(self, loaded: LoadedModel) -> LoadedTasks:
        """The tasks of the protocol. If they cannot be loaded, everything else is measured without them."""
        try:
            with translated(BenchmarkError, "cannot load the tasks"):
                return load_tasks(loaded, self.subject.protocol, self.subject.texts)
        except _TASK_ERRORS as error:
            log.warning("%s: no tasks are run: %s", self.subject.folder.name, error)
            return LoadedTasks(hashes={}, reason=self._missing(error))

    def _measure_tasks(self, loaded: LoadedModel) -> None:
        """If the tasks fail, what was measured before stays."""
        tasks = self._tasks
        if tasks.tasks is not None:
            self.subject.on_step("tasks")
        try:
            with translated(BenchmarkError, "cannot run the tasks"):
                answered = run_tasks(tasks, loaded, self.subject.protocol, self.subject.on_step)
        except _TASK_ERRORS as error:
            log.warning("%s: the tasks failed: %s", self.subject.folder.name, error)
            self._note_tasks(None, self._missing(error))
        else:
            self._note_tasks(answered, tasks.reason)
        # Not before: where memory ran out beside other models, they are run again.
        self._tasks = LoadedTasks(hashes={})

    def _note_tasks(self, run: TaskRun | None, reason: str | None) -> None:
        answers, scores = (None, None) if run is None else (run.answers, run.scores)
        details = replace(self.measured.details, tasks=scores, tasks_reason=reason)
        self._measured = replace(self.measured, answers=answers, details=details)

    def _further(
        self, loaded: LoadedModel, ref: TextRef, reference: Reference | None, scores: Mapping[str, WindowScores]
    ) -> FurtherText:
        """The figures of a further text. If it cannot be scored, it has the reason, and the others stay."""
        protocol, text = self.subject.protocol.on_text(ref), self.subject.texts[ref.sha256]
        quality = self._compared(loaded, reference, protocol, text)
        try:
            with translated(BenchmarkError, "the model fails on it"):
                perplexity = self._scored(loaded, protocol, text, quality, scores)
        except BenchmarkError as error:
            perplexity = TextPerplexity(reason=f"the text {ref.name} cannot be scored: {self._missing(error)}")
            log.warning("%s: %s", self.subject.folder.name, perplexity.reason)
        return FurtherText(quality=quality, perplexity=perplexity)

    def _compared(self, loaded: LoadedModel, reference: Reference | None, protocol: Protocol, text: str) -> Quality:
        """The comparison with the base on ``text``; empty without a ``reference``. If it fails, it has only the reason,
        and the other figures are kept."""
        if reference is None:
            return Quality()
        on_step = self.subject.on_step
        on_step("quality")
        try:
            with translated(BenchmarkError, "cannot compare with the base"):
                return compare(loaded, reference, protocol, text, lambda n, count: on_step(f"quality {n}/{count}"))
        except BenchmarkError as error:
            return Quality(reason=self._missing(error))

    def _scored(
        self,
        loaded: LoadedModel,
        protocol: Protocol,
        text: str,
        compared: Quality,
        scores: Mapping[str, WindowScores],
    ) -> TextPerplexity:
        """The perplexity of ``text``, for causal LMs only. Raises BenchmarkError if the model cannot read the text."""
        # Perplexity is meaningless for other tasks, and for random ids instead of a text.
        if loaded.kind is not ModelKind.CAUSAL_LM or loaded.tokenizer is None:
            return _stored_score(None, loaded)
        cut = text_windows(loaded, protocol, text)
        known = scores.get(protocol.eval_text_sha256)
        if known is not None and (scored := known.whole(len(cut))) is not None:
            return _stored_score(scored, loaded)
        nll, tokens = compared.window_nll, compared.window_tokens
        if nll is not None and tokens is not None and len(nll) == len(cut):
            # The comparison has already scored the same windows.
            return _stored_score(TextScore(window_nll=nll, window_tokens=tokens), loaded)
        on_step = self.subject.on_step
        return _stored_score(score_text(loaded, cut, lambda number: on_step(f"perplexity {number}/{len(cut)}")), loaded)


def _why_no_score(loaded: LoadedModel) -> str | None:
    """Why a causal language model has no perplexity; None for models that never have one."""
    if loaded.kind is not ModelKind.CAUSAL_LM:
        return None
    return loaded.why_no_tokenizer or "the evaluation text is too short: it has no token that can be scored"


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


def _finite(value: float | None) -> float | None:
    """``value``, or None if it is infinite or NaN, since columns store neither."""
    return value if value is not None and math.isfinite(value) else None

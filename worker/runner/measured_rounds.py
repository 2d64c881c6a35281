"""Measure the models of a bundle in rounds: in each round every model has a turn, in the first the baseline first.

The speed of a host varies from minute to minute. Taking turns makes a slow minute affect all models that are compared.
In the first round each model is alone on the device, and its memory is measured. In later rounds the models stay loaded
together if they fit. A baseline's quality is measured in the first round. That of the others comes after the last if
another process is to capture them: it can load them meanwhile, and earlier it would count in the memory of those that
are measured alone. Without a baseline, the first is the one that is still loaded from its trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from qbatch.core.domain import Protocol, Stage, format_job_id
from qbatch.core.errors import BenchmarkError, CudaOom, DeviceError, HostOom, JobError, Unsupported
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.worker.runner.base_outputs import BaseOutputs
from qbatch.worker.runner.checkpoint_jobs import MeasuredModel, Plan
from qbatch.worker.runner.finished_rows import FinishedRows, names
from qbatch.worker.runner.finite_weights import refuse_model_not_finite
from qbatch.worker.runner.loaded_models import LoadedModels
from qbatch.worker.runner.messages import MeasurementsOver, NothingTimed, Order
from qbatch.worker.runner.reports import Reports
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.sources.fetch import LocalSource

if TYPE_CHECKING:
    from qbatch.worker.measuring.model_benchmark import ModelBenchmark
    from qbatch.worker.measuring.row_benchmark import RowBenchmark
    from qbatch.worker.measuring.speed.generation import WarmedShapes
    from qbatch.worker.measuring.why.capture import Captures
    from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, Shape, StepKernels
    from qbatch.worker.measuring.why.kernels_server import KernelsServer
    from qbatch.worker.models.load import LoadedModel

log = logging.getLogger("qbatch.runner")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """A model's turn, repeated in each of its rounds. ``rows`` are by job id."""

    model: MeasuredModel
    benchmark: ModelBenchmark
    rows: dict[int, RowBenchmark]

    @property
    def jobs(self) -> tuple[int, ...]:
        return self.model.ids

    @property
    def rounds(self) -> int:
        """A model of which nothing is timed has one turn, for the rest."""
        return max((row.rounds_to_time for row in self.rows.values()), default=0) or 1

    @property
    def protocol(self) -> Protocol:
        """That of its jobs, as far as they do not differ in it."""
        return self.model.plans[0].settled.protocol

    @property
    def is_captured(self) -> bool:
        """Whether another process will measure its kernels, for which the device's memory must be free."""
        return any(row.captured_shape is not None for row in self.rows.values())

    @property
    def quality_comes_last(self) -> bool:
        """Whether its quality is measured after its rounds."""
        asked = self.protocol.quality and self.protocol.why
        return asked and self.rounds > 1 and self.model.published is not None

    @property
    def fault(self) -> DeviceError | None:
        """A device fault during the analysis of a row. The rows are complete, but the device is unusable here."""
        return next((row.fault for row in self.rows.values() if row.fault is not None), None)


class Rounds:
    """Measures the models of a bundle. Use it once."""

    def __init__(
        self,
        order: Order,
        reports: Reports,
        source: LocalSource,
        device: str,
        rows: FinishedRows,
        pauses: TimingPauses,
        loaded: LoadedModels,
        kernels: KernelsServer | None = None,
    ) -> None:
        self._order = order
        self._pauses = pauses
        self._reports = reports
        self._source = source
        self._device = device
        self._turns: list[_Turn] = []
        self._unmeasured: list[_Turn] = []
        self._models = loaded
        # Turns whose rounds are over, and whose kernels can be measured once the models of the others are unloaded.
        self._waiting: list[_Turn] = []
        self._base_outputs = BaseOutputs(order, reports, source)
        self._rows = rows
        self._kernels_server = kernels

    def run(self, models: Sequence[MeasuredModel], speeds: Mapping[int, KnownSpeed]) -> None:
        """Measure the open jobs of ``models``. The final message of each is sent in its last round, or after it.

        The jobs in ``speeds`` have a speed that is known, and are not timed.
        """
        from qbatch.worker.measuring.speed.generation import WarmedShapes
        from qbatch.worker.measuring.why.capture import Captures

        warmed = WarmedShapes()
        # One that is loaded, since it was tried, is the first.
        ordered = sorted(models, key=lambda model: self._models.get(model.ids) is None)
        self._turns = self._unmeasured = [self._turn(model, speeds, warmed) for model in ordered]
        last = max((turn.rounds for turn in self._turns), default=0)
        with Captures(self._kernels_server, log_path=self._order.log_path) as captures:
            for number in range(1, last + 1):
                if number == 2:
                    self._models.keep_together(
                        [turn.jobs for turn in self._turns_in(2) if self._reports.open(turn.jobs)]
                    )
                for turn in self._turns_in(number):
                    self._take(turn, is_first=number == 1, is_last=number == turn.rounds, captures=captures)
            waiting = [turn for turn in self._turns if turn in self._waiting and self._reports.open(turn.jobs)]
            self._measure_quality_last(waiting, captures)
            self._finish(waiting, captures)

    def _measure_quality_last(self, turns: Sequence[_Turn], captures: Captures) -> None:
        """Measure what is left of the quality of these models, whose rounds are over. Where there is room, the process
        that will capture them loads them meanwhile."""
        left = [turn for turn in turns if turn.quality_comes_last and turn.benchmark.why_no_quality is None]
        if not left:
            return
        self._reports.send(NothingTimed())
        requests = [request for _, _, request in self._captured(turns)] if self._models.are_together else []
        if requests and self._is_room_for_copies():
            captures.prepare(requests)
        for turn in left:
            with self._reports.failing(turn.jobs), self._if_published(turn, turn.benchmark.give_up_quality):
                self._or_alone(partial(self._measure_quality, turn), captures.release)

    def _is_room_for_copies(self) -> bool:
        try:
            return self._models.have_room_for_copies()
        except RuntimeError as error:  # a fault of the device, with which the next to use it is charged
            log.warning("no model is loaded ahead for its capture: %s", error)
            return False

    def _turns_in(self, number: int) -> Sequence[_Turn]:
        """The turns of a round: there and back, so that a host that slows steadily favours no model, and the model that
        is loaded is the next."""
        turns = [turn for turn in self._turns if number <= turn.rounds]
        return turns if number % 2 else turns[::-1]

    def _turn(self, model: MeasuredModel, speeds: Mapping[int, KnownSpeed], warmed: WarmedShapes) -> _Turn:
        from qbatch.worker.measuring.model_benchmark import ModelBenchmark
        from qbatch.worker.measuring.row_benchmark import RowBenchmark

        benchmark = ModelBenchmark(self._rows.subject(model))
        rows = {
            plan.job_id: RowBenchmark(
                benchmark,
                plan.settled.protocol,
                self._step_reporter(plan),
                known=speeds.get(plan.job_id),
                warmed=warmed,
            )
            for plan in model.plans
        }
        return _Turn(model=model, benchmark=benchmark, rows=rows)

    def _step_reporter(self, plan: Plan) -> Callable[[str], None]:
        return lambda step: self._reports.step([plan.job_id], step)

    def _take(self, turn: _Turn, *, is_first: bool, is_last: bool, captures: Captures) -> None:
        if not self._reports.open(turn.jobs):
            return
        note = partial(self._rows.send_unmeasured, turn.model) if is_first else partial(self._give_up_rest, turn)
        with self._reports.failing(turn.jobs), self._if_published(turn, note):
            self._measure(turn, is_first=is_first, is_last=is_last)
        if not is_last:
            return
        if turn.fault is not None:
            # Nothing else can be measured on this device, and nobody else is charged with it.
            for row in turn.rows.values():
                row.give_up_why(turn.fault)
            if turn.quality_comes_last:
                turn.benchmark.give_up_quality(turn.fault)
        elif self._models.are_together and (turn.is_captured or turn.quality_comes_last):
            self._waiting.append(turn)
            return
        else:
            self._measure_quality_last([turn], captures)
        self._finish([turn], captures)

    def _give_up_rest(self, turn: _Turn, error: JobError) -> None:
        """Leave out what the turns of the model have not measured to the end, and keep the rest."""
        for row in turn.rows.values():
            row.give_up_speed(error)
        if turn.quality_comes_last:
            turn.benchmark.give_up_quality(error)

    def _measure(self, turn: _Turn, *, is_first: bool, is_last: bool) -> None:
        if is_first and self._models.get(turn.jobs) is not None:
            # It was loaded for its trial. From here on a fault that ends the runner is its own.
            self._reports.enter(turn.jobs, Stage.BENCHMARKING)
        with self._pauses.timing():
            self._or_alone(lambda: self._load(turn))
        if is_first:
            if turn.model.published is None:
                refuse_model_not_finite(self._load(turn).model)
            turn.benchmark.prepare(self._load(turn))
        self._time_shapes(turn)
        if not self._reports.open(turn.jobs):
            return
        if is_first:
            self._note_peak(turn)
        if is_first and not turn.quality_comes_last:
            self._reports.send(NothingTimed())
            if turn.protocol.quality and turn.benchmark.why_no_quality is None:
                with self._if_published(turn, turn.benchmark.give_up_quality):
                    self._measure_quality(turn)
        if is_last:
            with self._pauses.timing():
                self._observe(turn)

    def _time_shapes(self, turn: _Turn) -> None:
        timed = [job_id for job_id in self._reports.open(turn.jobs) if turn.rows[job_id].rounds_to_time]
        for job_id in timed:
            if not self._reports.open([job_id]):
                return  # the previous shape made the device unusable, which leaves no job open
            give_up = turn.rows[job_id].give_up_speed
            with self._reports.failing([job_id]), self._if_published(turn, give_up), self._pauses.timing():
                self._or_alone(partial(self._time, turn, job_id))

    @contextlib.contextmanager
    def _if_published(self, turn: _Turn, note: Callable[[JobError], None]) -> Iterator[None]:
        """A published checkpoint is a success of its quantization: ``note`` why a part of it cannot be measured."""
        try:
            yield
        except (BenchmarkError, Unsupported) as error:
            if turn.model.published is None:
                raise
            log.warning("%s: not measured: %s", names(self._reports.open(turn.jobs)), error)
            note(error)

    def _time(self, turn: _Turn, job_id: int) -> None:
        loaded = self._load(turn)
        self._reports.enter([job_id], Stage.BENCHMARKING)
        turn.rows[job_id].time(loaded)

    def _or_alone(self, work: Callable[[], T], free: Callable[[], None] = lambda: None) -> T:
        """Do ``work``. If memory runs out while several models are loaded, no job is at fault: ``free`` what else takes
        memory, and do it again with only its own model loaded."""
        try:
            return work()
        except (CudaOom, HostOom) as error:
            if not self._models.are_together:
                raise
            said = str(error)
            log.warning("memory ran out with several models loaded (%s); from now on they are loaded in turns", said)
        # Here, since the error refers to what the work had allocated. A log record would, too, if it had the error.
        self._models.separate()
        free()
        return work()

    def _load(self, turn: _Turn) -> LoadedModel:
        """Load the model of the turn from its published files, unless it is loaded: since its last turn, or since those
        files were tried. Failures affect all its jobs."""
        from qbatch.worker.models.load import load

        loaded = self._models.get(turn.jobs)
        if loaded is not None:
            return loaded
        self._reports.enter(turn.jobs, Stage.LOADING)
        subject, trusted = turn.benchmark.subject, self._source.runs_code
        return self._models.add(
            turn.jobs,
            lambda: load(
                subject.folder, dtype=subject.dtype, device=self._device, trusted=trusted, adapter=subject.adapter
            ),
        )

    def _note_peak(self, turn: _Turn) -> None:
        peaks = [peak for row in turn.rows.values() if (peak := row.peak_bytes) is not None]
        weights_bytes = turn.benchmark.measured.weights_bytes
        self._models.note_peak(turn.jobs, weights_bytes=weights_bytes, peak_bytes=max(peaks, default=0))

    def _measure_quality(self, turn: _Turn) -> None:
        """Measure quality once for all jobs of the model, because it does not depend on the shape."""
        if not self._reports.open(turn.jobs):
            return
        loaded = self._load(turn)
        self._reports.enter(turn.jobs, Stage.BENCHMARKING)
        plan, is_baseline = turn.model.plans[0], turn.model.published is None
        if is_baseline:
            scores = self._base_outputs.keep(plan, turn.benchmark.subject, loaded)
            turn.benchmark.measure_quality(loaded, None, scores=scores)
            if turn.benchmark.unread_text is not None and not turn.protocol.speed:
                # Without a speed, nothing is known of it that would be worth a success.
                raise turn.benchmark.unread_text
            return
        reference, texts = self._base_outputs.find(plan), plan.settled.protocol.more_texts
        more = {text.name: found for text in texts if (found := self._base_outputs.find(plan, text)) is not None}
        turn.benchmark.measure_quality(loaded, reference, more)
        if loaded.tokenizer is None:
            for name in (None, *(text.name for text in texts)):
                turn.benchmark.note_not_compared(loaded.why_no_tokenizer or "it has no tokenizer", text=name)
            return
        if reference is None:
            turn.benchmark.note_not_compared(self._base_outputs.why_missing(plan))
        for text in texts:
            if text.name not in more:
                turn.benchmark.note_not_compared(self._base_outputs.why_missing(plan, text), text=text.name)

    def _observe(self, turn: _Turn) -> None:
        for job_id in self._reports.open(turn.jobs):
            self._or_alone(partial(self._observe_row, turn, job_id))

    def _observe_row(self, turn: _Turn, job_id: int) -> None:
        loaded = self._load(turn)
        self._reports.enter([job_id], Stage.BENCHMARKING)
        turn.rows[job_id].observe(loaded, is_alone=not self._models.are_together)

    def _finish(self, turns: Sequence[_Turn], captures: Captures) -> None:
        """Send the rows of models whose rounds are over."""
        kernels: dict[int, StepKernels] = {}
        with self._reports.failing(job_id for turn in turns for job_id in turn.jobs):
            kernels = self._kernels(turns, captures)
        self._note_measured(turns)
        for turn in turns:
            with self._reports.failing(turn.jobs):
                self._conclude(turn, kernels)

    def _note_measured(self, turns: Sequence[_Turn]) -> None:
        self._unmeasured = [turn for turn in self._unmeasured if turn not in turns]
        if turns and not self._reports.open(job_id for turn in self._unmeasured for job_id in turn.jobs):
            self._reports.send(MeasurementsOver())

    def _conclude(self, turn: _Turn, kernels: Mapping[int, StepKernels]) -> None:
        """Send all rows of the model. After a device fault, the rest of the bundle is left to a new runner."""
        ids = self._reports.open(turn.jobs)
        if not ids:
            return
        self._reports.enter(ids, Stage.BENCHMARKING)
        self._rows.confirm(turn.model)
        for job_id in ids:
            with self._reports.failing([job_id]):
                self._send(turn, job_id, kernels.get(job_id))
        if turn.fault is not None:
            log.warning("%s: %s", names(ids), turn.fault)
            self._reports.leave_spoilt_device(turn.fault)

    def _kernels(self, turns: Sequence[_Turn], captures: Captures) -> dict[int, StepKernels]:
        """Kernel timings by job id, for jobs whose protocol asks for them. One process measures all models and shapes;
        it needs the memory of those that are loaded here."""
        captured = self._captured(turns)
        if not captured:
            return {}
        self._models.unload()
        all_ids = tuple(job_id for _, ids, _ in captured for job_id in ids)
        self._reports.enter(all_ids, Stage.BENCHMARKING)
        self._reports.step(all_ids, "kernels")
        with self._pauses.timing():
            answers = captures.kernels([request for _, _, request in captured])
            found = {}
            for (turn, ids, _), answer in zip(captured, answers, strict=True):
                for job_id, kernels in zip(ids, answer, strict=True):
                    turn.rows[job_id].measure_roofs(kernels)
                    found[job_id] = kernels
        return found

    def _captured(self, turns: Sequence[_Turn]) -> list[tuple[_Turn, list[int], KernelsRequest]]:
        """The models whose kernels are to be measured, each with the jobs that its answer has a part for."""
        found = []
        for turn in turns:
            if shapes := self._captured_shapes(turn):
                request = turn.benchmark.kernels_request(
                    tuple(shapes.values()), device=self._device, trusted=self._source.runs_code
                )
                found.append((turn, list(shapes), request))
        return found

    def _captured_shapes(self, turn: _Turn) -> dict[int, Shape]:
        ids = self._reports.open(turn.jobs)
        return {job_id: shape for job_id in ids if (shape := turn.rows[job_id].captured_shape) is not None}

    def _send(self, turn: _Turn, job_id: int, kernels: StepKernels | None) -> None:
        measurement = turn.rows[job_id].measurement(kernels=kernels, interleaved_with=self._timed_beside(turn))
        self._rows.send(turn.model, job_id, measurement)

    def _timed_beside(self, turn: _Turn) -> list[str]:
        """The jobs of other models that were measured in the same rounds."""
        others = (other for other in self._turns if other is not turn)
        return [format_job_id(job_id) for other in others for job_id, row in other.rows.items() if row.rounds]

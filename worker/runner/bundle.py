"""Run a bundle on one device: fetch the source, quantize every width, publish, verify, and benchmark in rounds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qbatch.core.domain import Claim, DeviceKind, DType, Stage
from qbatch.core.errors import SourceChanged, StorageError, Unsupported
from qbatch.core.measured.known_speed import KnownSpeed
from qbatch.core.prior_quantization import stale_quantization
from qbatch.core.source_checks import check_source
from qbatch.core.sources import read_config, source_dtype
from qbatch.core.vocabulary import vocabulary_size
from qbatch.worker.checkpoints.published import Verified, find_published
from qbatch.worker.models.forbidden_code import refuse_forbidden_code
from qbatch.worker.models.load import translated
from qbatch.worker.models.tokenizer import load_tokenizer
from qbatch.worker.runner.adapter_publication import AdapterPublication
from qbatch.worker.runner.checkpoint_jobs import MeasuredModel, Plan, by_key, plan_job
from qbatch.worker.runner.finished_rows import FinishedRows
from qbatch.worker.runner.layer_searches import LayerSearches
from qbatch.worker.runner.loaded_models import LoadedModels
from qbatch.worker.runner.measured_rounds import Rounds
from qbatch.worker.runner.messages import (
    Answered,
    CheckpointVerified,
    MeasurementsOver,
    NothingTimed,
    Order,
    Progressed,
    Resolved,
)
from qbatch.worker.runner.publication import Publication
from qbatch.worker.runner.reports import ReportChannel, Reports
from qbatch.worker.runner.shared_speeds import SpeedKeys, agreeing
from qbatch.worker.runner.skip_lists import SkipLists
from qbatch.worker.runner.timing_pauses import TimingPauses
from qbatch.worker.sources.fetch import LocalSource, fetch_source

if TYPE_CHECKING:
    from qbatch.worker.measuring.why.kernels_server import KernelsServer

log = logging.getLogger("qbatch.runner")

_CHECKED_CHARACTERS = 4096


class Bundle:
    """The jobs of one source, run on one device. ``kernels``: the process that captures decode steps, if any."""

    def __init__(
        self, order: Order, link: ReportChannel, pauses: TimingPauses, kernels: KernelsServer | None = None
    ) -> None:
        self._order = order
        self._kernels = kernels
        self._pauses = pauses
        self._reports = Reports(link, (claim.job_id for claim in order.claims))
        self._device = "cuda:0" if order.device_kind is DeviceKind.CUDA else "cpu"
        self._loaded = LoadedModels(self._device)

    def run(self) -> None:
        """Run all jobs. Each ends with a message, unless a fault makes the device unusable for the remaining ones."""
        ids = self._reports.open()
        self._reports.enter(ids, Stage.FETCHING)
        with self._reports.failing(ids), self._source() as source:
            self._work(source)

    @contextlib.contextmanager
    def _source(self) -> Iterator[LocalSource]:
        ids = self._reports.open()
        progress = self._reports.throttled(
            lambda done, total: Progressed(job_ids=ids, bytes_read=done, bytes_written=0, bytes_total=total)
        )
        with fetch_source(
            self._order.claims[0].spec.source,
            cache=self._order.cache,
            cache_bytes=self._order.cache_bytes,
            policy=self._order.policy,
            on_progress=progress,
            digests=self._reports,
        ) as source:
            yield source

    def _work(self, source: LocalSource) -> None:
        # Judged once for all rows: what is no source of a checkpoint is no baseline either.
        headers = check_source(source.folder)
        if (stale := stale_quantization(read_config(source.folder), headers)) is not None:
            log.warning("the quantization in config.json is ignored: %s", stale)
        refuse_forbidden_code(source.folder, trusted=source.runs_code)
        dtype = source_dtype(headers)
        skip_lists = SkipLists(source, dtype)
        settled = [plan for claim in self._order.claims for plan in self._plan(claim, source, dtype, skip_lists)]
        speed_keys = SpeedKeys(source, self._order.device_uuid)
        plans = [plan if plan.searches else replace(plan, speed_key=speed_keys.of(plan.settled)) for plan in settled]
        if not plans:
            return
        answered = self._ask(plans)
        self._check_tokenizer(source, [plan for plan in plans if self._reports.open([plan.job_id])])
        models = by_key(plan for plan in plans if not plan.searches and self._reports.open([plan.job_id]))
        published = self._publish(source, models, answered.paths)
        measured = [
            self._model(source, members, published)
            for key, members in models.items()
            if key in published or members[0].settled.scheme.is_baseline
        ]
        searches = [plan for plan in plans if plan.searches]
        if not searches and not any(model.runs for model in measured):
            self._reports.send(NothingTimed())
            self._reports.send(MeasurementsOver())
        self._measure(source, answered.speeds, measured)
        if searches:
            self._loaded.unload()  # the model that was measured last
            LayerSearches(self._order, self._reports, source, self._device).run(searches)

    def _publish(
        self, source: LocalSource, models: Mapping[str, tuple[Plan, ...]], paths: Mapping[str, str]
    ) -> dict[str, Verified]:
        """The checkpoints first, those included that only adapters need; then the adapters."""
        place = (self._order, self._reports, source, self._device)
        published = Publication(*place, self._loaded, self._pauses).publish_all(
            by_key(plan.base for members in models.values() for plan in members), paths
        )
        adapted = {key: members for key, members in models.items() if members[0].settled.scheme.recovery is not None}
        if adapted:
            # A checkpoint that was tried for a job with an adapter is not the model that this job measures.
            self._loaded.unload()
        return published | AdapterPublication(*place).publish_all(adapted, published, paths)

    def _check_tokenizer(self, source: LocalSource, plans: Sequence[Plan]) -> None:
        """Read the tokenizer before anything is quantized: a fault in it would end the jobs that run a model later."""
        readers = [plan.job_id for plan in plans if plan.searches or plan.settled.protocol.runs_model]
        unreadable = translated(Unsupported, f"cannot load the tokenizer in {source.folder.name}")
        with self._reports.failing(readers), unreadable:
            tokenizer, why_none = load_tokenizer(source.folder, trusted=source.runs_code)
            if why_none is not None:
                log.warning("no text can be measured: %s", why_none)
                return
            rows = vocabulary_size(read_config(source.folder))
            if readers and rows is not None and len(tokenizer) > rows:
                self._warn_of_foreign_tokenizer(tokenizer, rows)

    def _warn_of_foreign_tokenizer(self, tokenizer: Any, rows: int) -> None:
        """Warn of a tokenizer of another model, which is larger than its model and uses what it has too much."""
        largest = max((max(tokenizer(text)["input_ids"], default=0) for text in self._texts()), default=0)
        if largest >= rows:
            log.warning(
                "no text can be measured: the tokenizer yields id %d, but the model embeds only %d", largest, rows
            )

    def _texts(self) -> list[str]:
        """The beginnings of the evaluation texts, which are measured in any case."""
        hashes = {claim.spec.protocol.eval_text_sha256 for claim in self._order.claims}
        return [self._order.texts[one][:_CHECKED_CHARACTERS] for one in sorted(hashes & self._order.texts.keys())]

    def _measure(self, source: LocalSource, speeds: Mapping[int, KnownSpeed], models: Sequence[MeasuredModel]) -> None:
        """Models of which only the size was asked for are counted; the others are loaded."""
        rows = FinishedRows(self._order, self._reports, source)
        for model in models:
            if not model.runs:
                with self._reports.failing(model.ids):
                    rows.send_counted(model)
        loaded = [model for model in models if model.runs]
        rounds = Rounds(
            self._order, self._reports, source, self._device, rows, self._pauses, self._loaded, self._kernels
        )
        rounds.run(loaded, agreeing(speeds, loaded))

    def _plan(self, claim: Claim, source: LocalSource, dtype: DType, skip_lists: SkipLists) -> list[Plan]:
        """Plan a job. None if a library that its method needs is not installed here, or its skip list cannot be
        resolved; that fails only this job."""
        with self._reports.failing([claim.job_id]):
            return [plan_job(claim, source, dtype, self._order.device_kind, skip_lists.of(claim.spec))]
        return []

    def _ask(self, plans: Sequence[Plan]) -> Answered:
        """Ask which jobs are answered already, which closes them, and what else is known."""
        answered = self._reports.ask(Resolved(jobs={plan.job_id: plan.identity for plan in plans}))
        if not answered.unverified:
            return answered
        for path, key in answered.unverified.items():
            # A checkpoint that cannot be verified answers no job, but that is no failure of these jobs.
            try:
                verified = find_published(self._order.storage, path, key)
                if verified is not None:
                    self._reports.send(CheckpointVerified(published=verified.confirm()))
            except (StorageError, SourceChanged) as error:
                log.warning("an earlier result cannot be reused: %s", error)
        still_open = {plan.job_id: plan.identity for plan in plans if self._reports.open([plan.job_id])}
        return self._reports.ask(Resolved(jobs=still_open))

    def _model(self, source: LocalSource, plans: tuple[Plan, ...], published: Mapping[str, Verified]) -> MeasuredModel:
        settled, storage = plans[0].settled, self._order.storage
        verified = published.get(settled.key)
        if verified is None:
            return MeasuredModel(plans=plans, folder=source.folder, verified=None)
        folder = storage / verified.published.path
        if settled.base_key is None:
            return MeasuredModel(plans=plans, folder=folder, verified=verified)
        base = published[settled.base_key]
        return MeasuredModel(
            plans=plans, folder=storage / base.published.path, verified=verified, adapter=folder, base=base
        )

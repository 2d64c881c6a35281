"""The searches of a bundle: which layers of its source stay at 16 bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from qbatch.core.domain import Stage
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.search_request import SearchRequest
from qbatch.worker.runner.checkpoint_jobs import Plan, by_key
from qbatch.worker.runner.finite_weights import refuse_model_not_finite
from qbatch.worker.runner.loaded_models import free_device_memory
from qbatch.worker.runner.messages import NothingTimed, Order, Searched
from qbatch.worker.runner.reports import Reports
from qbatch.worker.sources.fetch import LocalSource

log = logging.getLogger("qbatch.runner")


class LayerSearches:
    """Runs when everything else of the bundle is measured: the device is free then, and what searches find is compared
    with a baseline whose outputs are stored."""

    def __init__(self, order: Order, reports: Reports, source: LocalSource, device: str) -> None:
        self._order = order
        self._reports = reports
        self._source = source
        self._device = device

    def run(self, plans: Sequence[Plan]) -> None:
        """Search once for all jobs with one key. The final message of each is sent."""
        if plans:
            self._reports.send(NothingTimed())
        for key, members in by_key(plans).items():
            ids = tuple(plan.job_id for plan in members)
            if not self._reports.open(ids):
                continue
            free_device_memory()
            with self._reports.failing(ids):
                self._reports.enter(ids, Stage.SEARCHING)
                found = self._search(members[0], partial(self._reports.step, ids))
                self._reports.confirm(self._source)
                for job_id in self._reports.open(ids):
                    self._reports.done(Searched(job_id=job_id, key=key, found=found))
        free_device_memory()

    def _search(self, plan: Plan, report: Callable[[str], None]) -> FinishedSearch:
        from qbatch.worker.measuring.speed.size import measure_size
        from qbatch.worker.models.load import load
        from qbatch.worker.searching.chosen_scheme import with_skip_lists
        from qbatch.worker.searching.frontier_search import find_frontier
        from qbatch.worker.searching.opened_search import opened_search
        from qbatch.worker.searching.search_probes import search_probes
        from qbatch.worker.searching.sensitivity_search import measure_sensitivity

        began = time.monotonic()
        settled, request = plan.settled, plan.claim.spec.search
        assert isinstance(request, SearchRequest)  # noqa: S101  (only searches come here)
        protocol = request.protocol
        loaded = load(self._source.folder, dtype=settled.dtype, device=self._device, trusted=self._source.runs_code)
        refuse_model_not_finite(loaded.model)
        parameters = measure_size(loaded.model).num_parameters
        probes = search_probes(loaded, protocol, self._order.texts[protocol.text_sha256])
        with opened_search(loaded, probes, settled.scheme, report) as search:
            sensitivity = measure_sensitivity(search, protocol)
            frontier = find_frontier(search, sensitivity, protocol)
        frontier = with_skip_lists(type(loaded.model), loaded.model.config, settled.scheme, frontier)
        return FinishedSearch(
            sensitivity=sensitivity,
            frontier=frontier,
            parameters=parameters,
            seconds=time.monotonic() - began,
            device_name=self._order.device_name,
        )

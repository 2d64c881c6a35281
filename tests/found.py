"""What a search for the layers to keep at 16 bits might find, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qbatch.core.domain import JobSpec, Method
from qbatch.core.measured.details import Details
from qbatch.core.measured.measurement import Measurement
from qbatch.core.search.bound import Bound
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.core.search.search_request import SearchRequest
from qbatch.core.search.sensitivity import Estimate, GroupSensitivity, LayerGroup, Sensitivity, WeightErrors
from qbatch.models_db.batches import NewJob
from tests.rows import measured, spec

SEARCH_PROTOCOL = SearchProtocol(text_sha256="5" * 64)
KEY = "f" * 64
FOUND_KL = (0.10, 0.05, 0.03, 0.02, 0.01)
"""Of the points of ``a_search``, each with a layer more at 16 bits."""


def figure(mean: float, error: float | None = 0.001) -> Estimate:
    return Estimate(mean=mean, standard_error=error)


def a_search(kl: Sequence[float] = FOUND_KL) -> FinishedSearch:
    """Point ``n`` keeps the first ``n`` of the groups ``model.layers.0.a``, ``.1.a`` … at 16 bits, 100 bytes each."""
    groups = [
        LayerGroup(
            name=f"model.layers.{number}.a",
            layer=f"model.layers.{number}",
            modules=(f"model.layers.{number}.a.linear",),
            parameters=50,
            bytes_at_16_bits=130,
            bytes_quantized=30,
        )
        for number in range(len(kl) - 1)
    ]
    points = tuple(
        FrontierPoint(
            added=(groups[index - 1].name,) if index else (),
            modules=tuple(module for group in groups[:index] for module in group.modules),
            weights_bytes=1000 + 100 * index,
            kl=figure(value),
            gain=figure(kl[index - 1] - value) if index else None,
            ln_ppl_ratio=figure(value / 2),
            skip_list=tuple(f"kept.{number}" for number in range(index)),
        )
        for index, value in enumerate(kl)
    )
    sensitivities = tuple(
        GroupSensitivity(
            group=group,
            derivative=figure(kl[number] - kl[number + 1]),
            measured=figure((kl[number] - kl[number + 1]) / 2) if number < 2 else None,
            is_open=number < 3,
            weight_errors=WeightErrors(quantized=0.1, min_max_4_bits=0.2, min_max_8_bits=0.01),
        )
        for number, group in enumerate(groups)
    )
    return FinishedSearch(
        sensitivity=Sensitivity(
            method=Method.NF4,
            windows=16,
            rows=4000,
            kl=figure(kl[0]),
            groups=sensitivities,
            compared_groups=2,
            rank_correlation=None,
            slope_scale=0.5,
            unreached=(),
            forward_passes=5.5,
        ),
        frontier=Frontier(method=Method.NF4, windows=16, rows=4000, points=points, forward_passes=11.0),
        parameters=1000,
        seconds=12.0,
        device_name="a CPU",
    )


def search_spec(bound: Bound) -> JobSpec:
    return replace(spec(), search=SearchRequest(bound=bound, protocol=SEARCH_PROTOCOL))


def searching(bound: Bound, *, with_baseline: bool = False, force: bool = False) -> list[NewJob]:
    """A bundle with a search."""
    baseline = [NewJob(spec=spec("/models/a", Method.NONE), bits=16)] if with_baseline else []
    return [*baseline, NewJob(spec=replace(search_spec(bound), force=force), bits=4)]


def measured_with(
    kl: float | None,
    weights_bytes: int,
    *,
    key: str = "c" * 64,
    error: float = 0.001,
    more_texts: Mapping[str, Any] | None = None,
) -> Measurement:
    """The row of a published mixture. ``more_texts``: what was compared on further texts, by their names."""
    quality = {"reason": "its baseline failed"} if kl is None else {"kl_mean": kl, "kl_mean_se": error}
    further = {name: {"quality": compared} for name, compared in (more_texts or {}).items()}
    details = Details.from_json(
        {"task": "causal-lm", "quality": quality, "checkpoint_key": key, "more_texts": further or None}
    )
    return replace(measured(), weights_bytes=weights_bytes, kl_mean=kl, details=details)

"""The answer at the head of a report: for each model, which configuration to ship, where it is, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.metrics import DECODE, KL_MEAN, RANK_CORRELATION, THROUGHPUT, TOP1, WEIGHTS, MetricColumn
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.groups import ModelRows
from qbatch.views.metric_text import show_metric
from qbatch.views.ratios import show_relative
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_count, show_ratio

_COLUMNS = tuple(
    MetricColumn(metrics=metrics)
    for metrics in ((WEIGHTS,), (DECODE, THROUGHPUT), (KL_MEAN, RANK_CORRELATION), (TOP1,))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFigure:
    """A figure of the recommended configuration, and how it compares with the baseline's."""

    title: str
    text: str
    relative: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``scheme``: None if nothing is recommended. ``path``: None for a baseline, which is the source itself."""

    model: str
    parameters: str
    setting: str
    scheme: str | None
    is_baseline: bool
    path: str | None
    is_measured: bool = True
    reason: str
    figures: Sequence[AnswerFigure]


def answer_of(judged: JudgedGroup) -> Answer:
    ship = judged.recommendation.ship
    parameters = next((row.num_parameters for row in judged.group.rows if row.num_parameters is not None), None)
    return Answer(
        model=judged.model,
        parameters="" if parameters is None else show_count(parameters),
        setting=judged.setting,
        scheme=None if ship is None else show_scheme(ship),
        is_baseline=ship is not None and ship.is_baseline,
        path=None if ship is None else ship.checkpoint_path,
        reason=judged.recommendation.sentence,
        figures=[] if ship is None else list(_figures(ship, judged)),
    )


def _figures(ship: ResultRow, judged: JudgedGroup) -> Iterable[AnswerFigure]:
    for column in _COLUMNS:
        metric = column.metric_of(ship)
        if metric is not None:
            relative = show_relative(column, ship, judged.baseline(ship))
            unit = " nats" if metric is KL_MEAN else ""
            yield AnswerFigure(title=metric.label, text=show_metric(metric, ship) + unit, relative=relative)


def unmeasured_answer(model: ModelRows) -> Answer:
    """Of a model without any result."""
    return Answer(
        model=model.name,
        parameters="",
        setting="",
        scheme=None,
        is_baseline=False,
        path=None,
        is_measured=False,
        reason=f"It has no result: {_states(model.unmeasured)}.",
        figures=[],
    )


def _states(rows: Sequence[ResultRow]) -> str:
    """``2 failed, 1 queued``"""
    return ", ".join(f"{count} {state}" for state, count in Counter(row.state for row in rows).items())


def weights_saved(groups: Sequence[JudgedGroup]) -> str | None:
    """``44.9 GiB → 15.9 GiB (×0.35)``: the weights of what is recommended, beside those of its baselines.

    Of a model with several groups, the first that recommends anything counts. None if nothing can be compared.
    """
    pairs: dict[str, tuple[int, int]] = {}
    for judged in groups:
        ship = judged.recommendation.ship
        baseline = None if ship is None else (ship if ship.is_baseline else judged.baseline(ship))
        if ship is None or baseline is None or ship.weights_bytes is None or not baseline.weights_bytes:
            continue
        pairs.setdefault(judged.model, (baseline.weights_bytes, ship.weights_bytes))
    if not pairs:
        return None
    before, after = (sum(pair[number] for pair in pairs.values()) for number in (0, 1))
    return f"{show_bytes(before)} → {show_bytes(after)} ({show_ratio(after / before)})"

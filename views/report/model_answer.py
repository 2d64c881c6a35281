"""The answer at the head of a report: for each model, which configuration to ship, where it is, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.metric import MetricColumn
from qbatch.core.measured.metrics import DECODE, KL_MEAN, RANK_CORRELATION, THROUGHPUT, TOP1, WEIGHTS
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.groups import ModelRows
from qbatch.views.metric_text import show_metric
from qbatch.views.ratios import show_relative
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_count

_COLUMNS = tuple(
    MetricColumn(metrics=metrics)
    for metrics in ((WEIGHTS,), (DECODE, THROUGHPUT), (KL_MEAN, RANK_CORRELATION), (TOP1,))
)
_ONLY_BASELINES = "Only the unquantized model has a result, so there is nothing to choose from."


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
    ship = judged.ship
    parameters = next((row.num_parameters for row in judged.group.rows if row.num_parameters is not None), None)
    return Answer(
        model=judged.model,
        parameters="" if parameters is None else show_count(parameters),
        setting=judged.setting,
        scheme=None if ship is None else show_scheme(ship),
        is_baseline=ship is not None and ship.is_baseline,
        path=None if ship is None else ship.checkpoint_path,
        reason=_ONLY_BASELINES if judged.choice is None else judged.choice.recommendation.sentence,
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
    """The answer for a model without any result."""
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

"""Measures of the quality that quantization costs, and bounds on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.exponential import exponential
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.metric import Metric, Unit, Value
from qbatch.core.measured.metrics import KL_MEAN, PERPLEXITY, RANK_CORRELATION
from qbatch.core.measured.quality_figures import Quality
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.statistics.paired_difference import PairedDifference, difference_of_clusters
from qbatch.views.metric_text import show_value
from qbatch.views.noise import is_noise

WindowSums = tuple[Sequence[float], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityCost:
    """A measure of lost quality: lower is better, and ``none`` is the baseline's own value.

    ``metric`` decides what is noise. ``default`` is the bound unless the user sets another with ``option``.
    ``on_text`` and ``error_on_text``: its value on a further text, and the error of that. ``by_window``: the sums over
    the rows of each window, and the numbers of rows, of which this is the mean or a monotonic function; None where they
    are not known.
    """

    name: str
    metric: Metric
    value: Value
    error: Value
    none: float
    default: float
    option: str | None
    unit: Unit
    on_text: Callable[[Quality], float | None]
    error_on_text: Callable[[Quality], float | None]
    by_window: Callable[[ResultRow], WindowSums | None]

    def show(self, value: float) -> str:
        return show_value(self.unit, value)

    @property
    def suffix(self) -> str:
        return " nats" if self.unit is Unit.NATS else ""

    def show_with_error(self, row: ResultRow) -> str:
        """``2.6e-03 ± 4.9e-05 nats``. ``row`` must have a value."""
        value = self.value(row)
        return "" if value is None else self.show_with(value, self.error(row))

    def show_with(self, value: float, error: float | None) -> str:
        return self.show(value) + (f" ± {error:.1e}" if error is not None else "") + self.suffix


def _perplexity_ratio(row: ResultRow) -> float | None:
    return _exp(row.details.quality.ln_ppl_ratio)


def _exp(logarithm: float | None) -> float | None:
    return None if logarithm is None else exponential(logarithm)


def _ratio_error(quality: Quality) -> float | None:
    ratio, error = _exp(quality.ln_ppl_ratio), quality.ln_ppl_ratio_se
    return None if ratio is None or error is None else ratio * error


def _rank_correlation_lost(row: ResultRow) -> float | None:
    return _lost(row.details.quality.rank_correlation)


def _lost(correlation: float | None) -> float | None:
    return None if correlation is None else 1 - correlation


def _kl_by_window(row: ResultRow) -> WindowSums | None:
    quality = row.details.quality
    return (
        None if quality.window_kl is None or quality.window_rows is None else (quality.window_kl, quality.window_rows)
    )


def _nll_by_window(row: ResultRow) -> WindowSums | None:
    quality = row.details.quality
    known = quality.window_nll is not None and quality.window_tokens is not None
    return (quality.window_nll or (), quality.window_tokens or ()) if known else None


KL_COST = QualityCost(
    name="mean KL",
    metric=KL_MEAN,
    value=KL_MEAN.value,
    error=lambda row: row.details.quality.kl_mean_se,
    none=0.0,
    default=0.05,
    option="--max-kl",
    unit=Unit.NATS,
    on_text=lambda quality: quality.kl_mean,
    error_on_text=lambda quality: quality.kl_mean_se,
    by_window=_kl_by_window,
)
PERPLEXITY_COST = QualityCost(
    name="perplexity ratio to the baseline",
    metric=PERPLEXITY,
    value=_perplexity_ratio,
    error=lambda row: _ratio_error(row.details.quality),
    none=1.0,
    default=1.02,
    option="--max-ppl-ratio",
    unit=Unit.CORRELATION,
    on_text=lambda quality: _exp(quality.ln_ppl_ratio),
    error_on_text=_ratio_error,
    by_window=_nll_by_window,
)
RANK_COST = QualityCost(
    name="loss of rank correlation",
    metric=RANK_CORRELATION,
    value=_rank_correlation_lost,
    error=lambda _: None,
    none=0.0,
    default=0.02,
    option=None,
    unit=Unit.CORRELATION,
    on_text=lambda quality: _lost(quality.rank_correlation),
    error_on_text=lambda _: None,
    by_window=lambda _: None,
)
QUALITY_COSTS = (KL_COST, PERPLEXITY_COST, RANK_COST)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityBound:
    """The highest acceptable value of a cost. ``origin``: where it comes from, if the user did not give it.

    ``errors``: how many of a value's standard errors must be within it too.
    """

    cost: QualityCost
    limit: float
    origin: str | None = None
    errors: float = 0.0

    def __str__(self) -> str:
        changes = f"; {self.cost.option} changes it" if self.cost.option else ""
        origin = f" ({self.origin}{changes})" if self.origin else ""
        return f"a {self.cost.name} of at most {self.limit:g}{self.cost.suffix}{origin}"

    def broken_by(self, row: ResultRow) -> str | None:
        """Why ``row`` is not within the bound on every text that it was measured on; None if it is."""
        return self.broken_on_first_text(row) or next(iter(self.broken_on_further_texts(row)), None)

    def broken_on_first_text(self, row: ResultRow) -> str | None:
        details = row.details
        reason = details.quality.reason or row.not_measured.get(MeasuredPart.QUALITY) or details.perplexity.reason
        if row.is_baseline:
            return None
        return self._broken(self.cost.name, self.cost.value(row), reason, self.cost.error(row))

    def broken_on_further_texts(self, row: ResultRow) -> Iterable[str]:
        """Yield why ``row`` is not within the bound on a further text, for each such text."""
        for name, text in (row.details.more_texts or {}).items() if not row.is_baseline else ():
            what, value = f"{self.cost.name} on {name}", self.cost.on_text(text.quality)
            broken = self._broken(what, value, text.quality.reason, self.cost.error_on_text(text.quality))
            if broken is not None:
                yield broken

    def is_unknown(self, row: ResultRow) -> bool:
        """Whether the cost was not measured on some text that was to be."""
        further = (self.cost.on_text(text.quality) for text in (row.details.more_texts or {}).values())
        return None in (self.cost.value(row), *further)

    def _broken(self, what: str, value: float | None, reason: str | None, error: float | None = None) -> str | None:
        if value is None:
            return f"its {what} was not measured" + (f" ({reason})" if reason else "")
        if value > self.limit:
            return f"its {what}, {self.cost.show(value)}{self.cost.suffix}, is over {self.limit:g}"
        if self.errors and error is None:
            return f"whether its {what} keeps to {self.limit:g} is not known, since its error is not"
        if value + self.errors * (error or 0.0) > self.limit:
            return f"its {what} may be over {self.limit:g}: {self.cost.show(value)} ± {error:.1e}{self.cost.suffix}"
        return None


def first_known_cost(row: ResultRow) -> QualityCost | None:
    return next((cost for cost in QUALITY_COSTS if cost.value(row) is not None), None)


def cost_or_infinite(cost: QualityCost, row: ResultRow) -> float:
    value = cost.none if row.is_baseline else cost.value(row)
    return math.inf if value is None else value


# A difference is real from so many of its standard errors on: by chance, one in twenty is as large.
_ERRORS = 2


def is_same_cost(cost: QualityCost, first: ResultRow, second: ResultRow) -> bool:
    """Whether two costs differ by less than two standard errors of their difference, or neither is distinguishable from
    the baseline."""
    if all(row.is_baseline or is_noise(cost.metric, row) for row in (first, second)):
        return True
    paired = paired_difference(cost, first, second)
    if paired is not None:
        return paired.mean == 0 or (paired.error is not None and abs(paired.mean) < _ERRORS * paired.error)
    errors = [0.0 if row.is_baseline else cost.error(row) for row in (first, second)]
    difference = abs(cost_or_infinite(cost, first) - cost_or_infinite(cost, second))
    known = [error for error in errors if error is not None]
    return difference == 0 or (len(known) == 2 and difference < _ERRORS * math.hypot(*known))


def paired_difference(cost: QualityCost, first: ResultRow, second: ResultRow) -> PairedDifference | None:
    """How much more of ``cost`` the first has than the second, on the same windows; None if they are not known.

    Of perplexities it is the difference of their logarithms. Its error is far smaller than that of two costs measured
    on texts of their own, since a window that is hard for one model is hard for the other.
    """
    one, other = cost.by_window(first), cost.by_window(second)
    if one is None or other is None or list(one[1]) != list(other[1]) or not one[1]:
        return None
    return difference_of_clusters([mine - its for mine, its in zip(one[0], other[0], strict=True)], one[1])


def cost_to_bound(rows: Sequence[ResultRow]) -> QualityCost | None:
    """The first cost that any row has, or KL if no row has one, so that rows of unknown quality do not qualify.

    None if all rows are baselines.
    """
    if all(row.is_baseline for row in rows):
        return None
    return next((cost for cost in QUALITY_COSTS if any(cost.value(row) is not None for row in rows)), KL_COST)

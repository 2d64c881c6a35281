"""Measures of what quantization costs in quality, and bounds on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qbatch.views.figures import Row, dig
from qbatch.views.noise import is_noise, quality
from qbatch.views.scheme import is_baseline
from qbatch.views.units import show_nats

# Above it a float ends.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A measure of quality lost; the lower the better, ``none`` is the baseline's own. ``key`` is its figure's."""

    name: str
    key: str
    of: Callable[[Row], float | None]
    error: Callable[[Row], float | None]
    none: float
    default: float
    option: str | None
    show: Callable[[float], str]
    unit: str = ""

    def show_with_error(self, row: Row) -> str:
        """``2.6e-03 ± 4.9e-05 nats``; of a row that has it."""
        value, error = self.of(row), self.error(row)
        shown = "" if value is None else self.show(value)
        return shown + (f" ± {error:.1e}" if error is not None else "") + self.unit


def _ppl_ratio(row: Row) -> float | None:
    logarithm = quality(row, "ln_ppl_ratio")
    if logarithm is None:
        return None
    return math.exp(logarithm) if logarithm < _LARGEST_EXPONENT else math.inf


def _ppl_ratio_error(row: Row) -> float | None:
    ratio, error = _ppl_ratio(row), quality(row, "ln_ppl_ratio_se")
    return None if ratio is None or error is None else ratio * error


def _rank_loss(row: Row) -> float | None:
    correlation = quality(row, "rank_correlation")
    return None if correlation is None else 1 - correlation


KL = Loss(
    name="mean KL",
    key="kl_mean",
    of=lambda row: dig(row, "kl_mean"),
    error=lambda row: quality(row, "kl_mean_se"),
    none=0.0,
    default=0.05,
    option="--max-kl",
    show=show_nats,
    unit=" nats",
)
PERPLEXITY = Loss(
    name="perplexity over the baseline's",
    key="perplexity",
    of=_ppl_ratio,
    error=_ppl_ratio_error,
    none=1.0,
    default=1.02,
    option="--max-ppl-ratio",
    show=lambda value: f"{value:.4f}",
)
RANKS = Loss(
    name="loss of rank correlation",
    key="details.quality.rank_correlation",
    of=_rank_loss,
    error=lambda _: None,
    none=0.0,
    default=0.02,
    option=None,
    show=lambda value: f"{value:.4f}",
)
LOSSES = (KL, PERPLEXITY, RANKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A quality loss that may not be passed."""

    loss: Loss
    limit: float
    is_default: bool

    def __str__(self) -> str:
        own = f", which {self.loss.option} changes" if self.loss.option else ""
        default = f" (the default{own})" if self.is_default else ""
        return f"a {self.loss.name} of at most {self.limit:g}{self.loss.unit}{default}"

    def broken_by(self, row: Row) -> str | None:
        if is_baseline(row):
            return None
        value = self.loss.of(row)
        if value is None:
            reason = dig(row, "details.quality.reason")
            return f"its {self.loss.name} was not measured" + (f" ({reason})" if reason else "")
        if value <= self.limit:
            return None
        return f"its {self.loss.name}, {self.loss.show(value)}{self.loss.unit}, is over {self.limit:g}"


def own_loss(row: Row) -> Loss | None:
    return next((loss for loss in LOSSES if loss.of(row) is not None), None)


def value_of(loss: Loss, row: Row) -> float:
    value = loss.none if is_baseline(row) else loss.of(row)
    return math.inf if value is None else value


def same_loss(loss: Loss, first: Row, second: Row) -> bool:
    """Less than one standard error of the difference apart, or neither distinguishable from the baseline."""
    if all(is_baseline(row) or is_noise(loss.key, row) for row in (first, second)):
        return True
    errors = [0.0 if is_baseline(row) else loss.error(row) for row in (first, second)]
    gap = abs(value_of(loss, first) - value_of(loss, second))
    known = [error for error in errors if error is not None]
    return gap == 0 or (len(known) == 2 and gap < math.hypot(*known))


def measured_loss(rows: Sequence[Row]) -> Loss | None:
    """The first that any row has; KL where no row has one, since quality unknown is no quality."""
    if all(is_baseline(row) for row in rows):
        return None
    return next((loss for loss in LOSSES if any(loss.of(row) is not None for row in rows)), KL)

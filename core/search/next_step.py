"""From a frontier and a bound to the mixture to publish, and to the next one where that was not enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qbatch.core.exponential import exponential
from qbatch.core.search.bound import Bound
from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.core.search.sensitivity import Estimate

MOST_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedPoint:
    """A published point as its own row has it, on the one of its evaluation texts where it is farthest from the base.
    ``index``: which of the frontier's points. ``why_not_compared``: why the row has no KL."""

    index: int
    weights_bytes: int
    kl: Estimate | None
    ln_ppl_ratio: Estimate | None
    why_not_compared: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishPoint:
    """The point with this index is to be published and measured."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundMet:
    """The row of the point with this index is the answer."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundMissed:
    """No point is left to try. ``nearest``: the index of the tried one that misses by least, two errors included; None
    if none was tried."""

    nearest: int | None
    reason: str


NextStep = PublishPoint | BoundMet | BoundMissed


def next_step(frontier: Frontier, bound: Bound, tried: Sequence[TriedPoint]) -> NextStep:
    """What to do after the points in ``tried`` were published and measured, in this order."""
    met = next((row for row in tried if _is_met(bound, row)), None)
    if met is not None:
        return BoundMet(index=met.index)
    incomparable = (row for row in tried if bound.is_about_quality and not _is_judged(bound, row))
    if (unknown := next(incomparable, None)) is not None:
        reason = f"a mixture was published, but nobody can say whether it has {bound}: {_shown(bound, unknown)}"
        advice = "" if _bounded(bound, unknown) is None else "; a longer evaluation text has several windows"
        return BoundMissed(nearest=unknown.index, reason=reason + advice)
    candidate = _candidate(frontier, bound, tried)
    if candidate is not None and len(tried) < MOST_TRIES:
        return PublishPoint(index=candidate)
    return _missed(frontier, bound, tried)


def _is_met(bound: Bound, row: TriedPoint) -> bool:
    return bound.holds_for(kl=row.kl, ln_ppl_ratio=row.ln_ppl_ratio, weights_bytes=row.weights_bytes)


def _candidate(frontier: Frontier, bound: Bound, tried: Sequence[TriedPoint]) -> int | None:
    """The next point to try. The first: the smallest that is predicted to be within the bound; of bytes, the one with
    the lowest KL, or the smallest that cannot be told from it. After it, the next larger one that is still predicted to
    be, once the search's figures are corrected by how much the evaluation text asked for so far; without any such, the
    next larger one with a lower KL."""
    points = frontier.points
    if bound.max_weights_bytes is not None:
        untried = set(range(len(points))) - {row.index for row in tried}
        fitting = (index for index in untried if bound.is_predicted_by(points[index]))
        best = min(fitting, key=lambda index: (points[index].kl.mean, index), default=None)
        smaller = None if best is None else points[best].same_as
        return smaller if smaller in untried else best
    if not tried:
        return next((index for index, point in enumerate(points) if bound.is_predicted_by(point)), None)
    last = max(row.index for row in tried)
    lower = [index for index in range(last + 1, len(points)) if points[index].kl.mean < points[last].kl.mean]
    predicted = (index for index in lower if bound.is_predicted_by(_corrected(points[index], frontier, tried)))
    return next(predicted, lower[0] if lower else None)


def _corrected(point: FrontierPoint, frontier: Frontier, tried: Sequence[TriedPoint]) -> FrontierPoint:
    """The point as the evaluation text would have it, if it differs from the search text like in the worst row yet: a
    KL by a factor, the logarithm of a ratio by a summand."""
    pairs = [(row, frontier.points[row.index]) for row in tried]
    factors = [_factor(row.kl, one.kl) for row, one in pairs if row.kl is not None]
    summands = [_summand(row.ln_ppl_ratio, one.ln_ppl_ratio) for row, one in pairs]
    kl = _scaled(point.kl, max(factors, default=1.0))
    ratio = point.ln_ppl_ratio
    return replace(point, kl=kl, ln_ppl_ratio=ratio and replace(ratio, mean=ratio.mean + max(summands, default=0.0)))


def _factor(seen: Estimate, predicted: Estimate) -> float:
    is_known = 0 < predicted.upper < math.inf and seen.upper < math.inf
    return max(1.0, seen.upper / predicted.upper) if is_known else 1.0


def _summand(seen: Estimate | None, predicted: Estimate | None) -> float:
    if seen is None or predicted is None or not (seen.upper < math.inf and predicted.upper < math.inf):
        return 0.0
    return max(0.0, seen.upper - predicted.upper)


def _scaled(figure: Estimate, factor: float) -> Estimate:
    error = figure.standard_error
    return Estimate(mean=figure.mean * factor, standard_error=None if error is None else error * factor)


def _missed(frontier: Frontier, bound: Bound, tried: Sequence[TriedPoint]) -> BoundMissed:
    if not tried:
        return BoundMissed(nearest=None, reason=f"no mixture was found with {_rule(bound)}: {_best(frontier, bound)}")
    nearest = min(tried, key=lambda row: _distance(bound, row))
    tries = "1 mixture was" if len(tried) == 1 else f"{len(tried)} mixtures were"
    return BoundMissed(
        nearest=nearest.index,
        reason=f"{tries} published and none has {_rule(bound)}; the nearest, mixture {nearest.index}, keeps "
        f"{len(frontier.points[nearest.index].modules)} layers at 16 bits: {_shown(bound, nearest)}",
    )


def _rule(bound: Bound) -> str:
    """The bound as it is judged: a figure may be below it, and with its errors not."""
    return f"{bound}, two errors included" if bound.is_about_quality else str(bound)


def _best(frontier: Frontier, bound: Bound) -> str:
    points = frontier.points
    if bound.max_weights_bytes is not None:
        return f"with every layer quantized the weights take {points[0].weights_bytes:,} bytes"
    if bound.max_ppl_ratio is not None:
        ratios = [point.ln_ppl_ratio for point in points if point.ln_ppl_ratio is not None]
        lowest = min(ratios, key=lambda ratio: (ratio.upper, ratio.mean), default=None)
        if lowest is None:
            return "the search text gives this model no perplexity"
        return f"the lowest ratio on the search text is {_as_ratio(lowest)}"
    best = min(points, key=lambda point: (point.kl.upper, point.kl.mean))
    lowest_kl = f"the lowest KL on the search text is {_with_error(best.kl)}, at {best.weights_bytes:,} bytes"
    floor = frontier.floor_kl
    is_at_floor = floor is not None and best.kl.mean <= floor
    return f"{lowest_kl}, and 16-bit arithmetic alone causes {floor:.4g}" if is_at_floor else lowest_kl


def _distance(bound: Bound, row: TriedPoint) -> tuple[float, float]:
    """What is least for the row that comes nearest to the bound."""
    if bound.max_weights_bytes is not None:
        return float(row.weights_bytes), 0.0
    figure = _bounded(bound, row)
    return (math.inf, math.inf) if figure is None else (figure.upper, figure.mean)


def _bounded(bound: Bound, row: TriedPoint) -> Estimate | None:
    return row.ln_ppl_ratio if bound.max_ppl_ratio is not None else row.kl


def _is_judged(bound: Bound, row: TriedPoint) -> bool:
    """Whether the row's figure and its error are known. Of one window no error is."""
    figure = _bounded(bound, row)
    return figure is not None and figure.standard_error is not None


def _shown(bound: Bound, row: TriedPoint) -> str:
    if bound.max_weights_bytes is not None:
        return f"{row.weights_bytes:,} bytes"
    if bound.max_ppl_ratio is not None:
        return _unknown(row) if row.ln_ppl_ratio is None else f"ratio {_as_ratio(row.ln_ppl_ratio)}"
    return _unknown(row) if row.kl is None else f"KL {_with_error(row.kl)}"


def _unknown(row: TriedPoint) -> str:
    return f"it was not compared with its baseline ({row.why_not_compared or 'its quality was not measured'})"


def _as_ratio(logarithm: Estimate) -> str:
    ratio, error = exponential(logarithm.mean), logarithm.standard_error
    return _with_error(Estimate(mean=ratio, standard_error=None if error is None else ratio * error), digits=5)


def _with_error(figure: Estimate, *, digits: int = 4) -> str:
    error = figure.standard_error
    return f"{figure.mean:.{digits}g} " + ("(error unknown, one window)" if error is None else f"± {error:.2g}")

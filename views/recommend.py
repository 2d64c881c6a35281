"""Recommend one of a group's configurations, in a sentence that gives the reasons and the scope."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.metric import Metric
from qbatch.core.measured.metrics import DECODE, THROUGHPUT, WEIGHTS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.search.sensitivity import STANDARD_ERRORS
from qbatch.views.answer_comparisons import compare_answers
from qbatch.views.audit_text import audit_warnings, defects
from qbatch.views.comparison import Preference
from qbatch.views.groups import Group
from qbatch.views.metric_text import show_metric
from qbatch.views.missing_parts import why_no_quality
from qbatch.views.noise import NOT_DISTINGUISHABLE, is_about_equal, is_noise, same_speed
from qbatch.views.quality_bounds import (
    KL_COST,
    PERPLEXITY_COST,
    QUALITY_COSTS,
    QualityBound,
    cost_or_infinite,
    cost_to_bound,
    first_known_cost,
    is_same_cost,
    paired_difference,
)
from qbatch.views.ratios import ratio_of
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_rate, show_ratio

_OF_SEARCH = "the bound of --scheme auto"
_RATES = ((DECODE, "decodes"), (THROUGHPUT, "processes its input"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """``ship`` is None if nothing qualifies.

    ``prefer``: what was preferred. ``rejected``: the reasons, by job id. ``alike``: the job ids that cannot be
    distinguished from ``ship`` in that.
    """

    ship: ResultRow | None
    sentence: str
    prefer: str
    bounds: Sequence[str]
    rejected: Mapping[str, Sequence[str]]
    alike: Sequence[str] = ()


def recommend(group: Group, preference: Preference) -> Recommendation:
    """Recommend the configuration of ``group`` to ship. Where quality was not measured, none is recommended.

    If the user gives neither a preference nor a limit on quality or bytes, the bound of the group's search decides,
    where there is one.
    """
    bounds, is_asked = quality_bounds_for(group, preference), preference.max_weights_bytes is not None
    preference = preference_within(group, preference)
    prefer = preference.prefer
    if (reason := _why_unknown(group)) is not None:
        sentence = f"Nothing is recommended: the quality of the quantized models was not measured, since {reason}."
        return Recommendation(ship=None, sentence=sentence, prefer=prefer, bounds=(), rejected={})
    bounds_text = [str(bound) for bound in bounds]
    if preference.max_weights_bytes is not None:
        origin = "" if is_asked else f" ({_OF_SEARCH}; --max-weights-bytes changes it)"
        bounds_text.append(f"weights of at most {show_bytes(preference.max_weights_bytes)}{origin}")
    if preference.min_tokens_per_s is not None:
        bounds_text.append(f"a rate of at least {show_rate(preference.min_tokens_per_s, 'tok')}")
    rejected = {row.job_id: reasons for row in group.rows if (reasons := list(_reasons(row, bounds, preference)))}
    fit = [row for row in group.rows if row.job_id not in rejected]
    if not fit:
        sentence = _nothing(group, rejected)
        return Recommendation(ship=None, sentence=sentence, prefer=prefer, bounds=bounds_text, rejected=rejected)
    ship, alike = _choose(fit, preference)
    if ship.is_baseline and group.awaits_search:
        sentence = "Nothing is recommended yet: the search for the layers to keep at 16 bits has not ended."
        return Recommendation(ship=None, sentence=sentence, prefer=prefer, bounds=bounds_text, rejected=rejected)
    if preference.prefer != "speed":
        ship, alike = _prefer_better_answers(ship, alike)
    sentence = _sentence(group, ship, alike, bounds, bounds_text, rejected, preference)
    return Recommendation(
        ship=ship,
        sentence=sentence,
        prefer=prefer,
        bounds=bounds_text,
        rejected=rejected,
        alike=[row.job_id for row in alike],
    )


def _why_unknown(group: Group) -> str | None:
    """Why nothing is known of the quality of any quantized model in the group; None if something may be."""
    reasons = [_why_no_quality(row) for row in group.rows if not row.is_baseline]
    return reasons[0] if reasons and all(reasons) else None


def _why_no_quality(row: ResultRow) -> str | None:
    # A checkpoint with a defect needs no other reason.
    return None if any(True for _ in defects(row)) else why_no_quality(row)


def preference_within(group: Group, preference: Preference) -> Preference:
    """What decides in ``group``: what the user gives, else the bound of its search, else the defaults. A rate may be
    asked for besides."""
    if group.search is None or replace(preference, min_tokens_per_s=None) != Preference():
        return preference
    bound = dict(group.search.mixture.bound or {})
    # Who gives the bytes wants the best that fits into them.
    return replace(preference, **bound, prefer="quality" if "max_weights_bytes" in bound else preference.prefer)


def quality_bounds_for(group: Group, preference: Preference) -> list[QualityBound]:
    """The bounds on quality that decide which rows of ``group`` qualify: the user's, its search's, or a default one."""
    decides = preference_within(group, preference)
    # A search publishes what is within its bound with two standard errors, so nothing else is better within it.
    of_search: dict[str, Any] = {} if decides == preference else {"origin": _OF_SEARCH, "errors": STANDARD_ERRORS}
    requested = [
        QualityBound(cost=cost, limit=limit, **of_search)
        for cost, limit in ((KL_COST, decides.max_kl), (PERPLEXITY_COST, decides.max_ppl_ratio))
        if limit is not None
    ]
    if requested or decides.prefer == "quality":
        return requested
    cost = cost_to_bound(group.rows)
    return [] if cost is None else [QualityBound(cost=cost, limit=cost.default, origin="the default")]


def _reasons(row: ResultRow, bounds: Sequence[QualityBound], preference: Preference) -> Iterable[str]:
    """Yield the reasons why a row does not qualify. Nothing if it does."""
    yield from defects(row)
    yield from (reason for bound in bounds if (reason := bound.broken_by(row)) is not None)
    if preference.max_weights_bytes is not None and _weights_bytes(row) > preference.max_weights_bytes:
        yield f"its weights, {show_metric(WEIGHTS, row)}, are over {show_bytes(preference.max_weights_bytes)}"
    if preference.min_tokens_per_s is not None:
        yield from _too_slow(row, preference.min_tokens_per_s)
    elif preference.prefer == "speed" and rate_of(row) is None:
        yield _speed_unknown(row)
    if preference.prefer == "quality" and not bounds and not row.is_baseline and first_known_cost(row) is None:
        yield "its quality against the baseline was not measured"


def lacks_a_figure(row: ResultRow, bounds: Sequence[QualityBound], preference: Preference) -> bool:
    """Whether a quantized row may be without a recommendation only because something was not measured."""
    needs_rate = preference.prefer == "speed" and rate_of(row) is None
    needs_decoding = preference.min_tokens_per_s is not None and row.decode_tokens_per_s is None
    return (
        first_known_cost(row) is None or needs_rate or needs_decoding or any(bound.is_unknown(row) for bound in bounds)
    )


def _too_slow(row: ResultRow, least: float) -> Iterable[str]:
    if row.decode_tokens_per_s is None:
        yield _speed_unknown(row)
    elif row.decode_tokens_per_s < least:
        yield f"its rate, {show_metric(DECODE, row)}, is under {show_rate(least, 'tok')}"


def _speed_unknown(row: ResultRow) -> str:
    reason = row.not_measured.get(MeasuredPart.SPEED)
    return "its speed was not measured" + (f" ({reason})" if reason else "")


def rate_of(row: ResultRow) -> Metric | None:
    """The metric of the row's speed; None if it was not measured."""
    return next((metric for metric, _ in _RATES if metric.value(row) is not None), None)


def _weights_bytes(row: ResultRow) -> float:
    return math.inf if row.weights_bytes is None else row.weights_bytes


# The choice: (the row to ship, the others that cannot be distinguished from it)


def _choose(fit: Sequence[ResultRow], preference: Preference) -> tuple[ResultRow, list[ResultRow]]:
    if preference.prefer == "speed":
        return _fastest(fit)
    if preference.prefer == "quality":
        return _nearest([row for row in fit if not row.is_baseline] or fit)
    least = min(map(_weights_bytes, fit))
    return _nearest([row for row in fit if _weights_bytes(row) == least])


def _fastest(rows: Sequence[ResultRow]) -> tuple[ResultRow, list[ResultRow]]:
    rated = [(rate, value, row) for row in rows if (rate := rate_of(row)) and (value := rate.value(row)) is not None]
    rate, _, best = max(rated, key=lambda one: one[1])
    return _smallest_of([row for row in rows if row is best or same_speed(rate, best, row)])


def _nearest(rows: Sequence[ResultRow]) -> tuple[ResultRow, list[ResultRow]]:
    known = (cost for cost in QUALITY_COSTS if all(row.is_baseline or cost.value(row) is not None for row in rows))
    cost = next(known, None)
    if cost is None or len(rows) == 1:
        return rows[0], []
    best = min(rows, key=lambda row: cost_or_infinite(cost, row))
    return _smallest_of([row for row in rows if row is best or is_same_cost(cost, best, row)])


def _smallest_of(alike: Sequence[ResultRow]) -> tuple[ResultRow, list[ResultRow]]:
    ship = min(alike, key=_weights_bytes)
    return ship, [row for row in alike if row is not ship]


def _prefer_better_answers(ship: ResultRow, alike: Sequence[ResultRow]) -> tuple[ResultRow, list[ResultRow]]:
    """Of rows that the other measures cannot distinguish, take one whose answers to tasks are shown to be better.

    It must be better in some task and worse in none.
    """
    compared = compare_answers([(row, ship) for row in alike])
    worse = {each.row.job_id for each in compared if each.is_worse}
    better = [each.row for each in compared if each.is_shown and each.row.job_id not in worse]
    if not better:
        return ship, list(alike)
    return better[0], [row for row in (ship, *alike) if row is not better[0]]


# The sentence


def _name(row: ResultRow) -> str:
    return f"{show_scheme(row)} ({row.job_id})"


def _nothing(group: Group, rejected: Mapping[str, Sequence[str]]) -> str:
    each = (f"{_name(row)}: {'; '.join(rejected[row.job_id])}" for row in group.rows)
    return f"Nothing qualifies. {'. '.join(each)}."


def _sentence(
    group: Group,
    ship: ResultRow,
    alike: Sequence[ResultRow],
    bounds: Sequence[QualityBound],
    bounds_text: Sequence[str],
    rejected: Mapping[str, Sequence[str]],
    preference: Preference,
) -> str:
    baseline = group.baselines.get(ship.job_id)
    reason = _reason(ship, baseline, bounds_text, preference, is_alone=not alike)
    sentences = [
        f"Ship {_name(ship)}: {reason}",
        *_alike(ship, alike, preference),
        *_quality(ship, bounds),
        *_speed(ship, baseline),
        *_why_unquantized(group, ship, rejected),
        *_worse_on_further_texts(group, ship, bounds),
        *map(_capitalized, audit_warnings(ship)),
        _scope(ship),
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def _capitalized(clause: str) -> str:
    return clause[:1].upper() + clause[1:]


def _reason(
    ship: ResultRow, baseline: ResultRow | None, bounds_text: Sequence[str], preference: Preference, *, is_alone: bool
) -> str:
    within = f" with {' and '.join(bounds_text)}" if bounds_text else ""
    if preference.prefer == "speed":
        return f"{'the highest rate' if is_alone else 'one of the highest rates'} measured{within}"
    if preference.prefer == "quality":
        return f"{_nearest_in_words(ship, is_alone=is_alone)}{within}"
    ratio = ratio_of(WEIGHTS, ship, baseline)
    of_base = "" if ratio is None else f", {show_ratio(ratio)}"
    return f"the smallest weights ({show_metric(WEIGHTS, ship)}{of_base}){within}"


def _nearest_in_words(ship: ResultRow, *, is_alone: bool) -> str:
    if ship.is_baseline:
        return "the unquantized model itself"
    return f"{'the quantized model' if is_alone else 'one of the quantized models'} nearest to the baseline"


def _alike(ship: ResultRow, alike: Sequence[ResultRow], preference: Preference) -> Iterable[str]:
    if alike:
        is_of_speed = preference.prefer == "speed"
        others = " and ".join(_name(row) + ("" if is_of_speed else _difference(ship, row)) for row in alike)
        what = "speed" if is_of_speed else "quality"
        is_smaller = any(_weights_bytes(row) > _weights_bytes(ship) for row in alike)
        smaller = ", and its weights are smaller" if is_smaller else ""
        yield f"Its {what} is {NOT_DISTINGUISHABLE} from that of {others}{smaller}"
        if not is_of_speed:
            yield from _answers_of_alike(ship, alike)


def _answers_of_alike(ship: ResultRow, alike: Sequence[ResultRow]) -> Iterable[str]:
    compared = compare_answers([(row, ship) for row in alike if not row.is_baseline])
    if not compared:
        if not any(row.is_baseline for row in (ship, *alike)):
            yield "Answers to tasks (--tasks) may tell them apart"
        return
    for each in compared:
        if each.is_shown:
            yield f"In {each.task}, the answers of {_name(each.row)} are {'worse' if each.is_worse else 'better'}"
    if not any(each.is_shown for each in compared):
        yield "Their answers to tasks show no difference either"


def _difference(ship: ResultRow, other: ResultRow) -> str:
    """How far apart the two are on the same windows, in parentheses; "" if that is not known."""
    cost = first_known_cost(ship)
    paired = None if cost is None else paired_difference(cost, ship, other)
    if cost is None or paired is None or paired.error is None:
        return ""
    what = "ln perplexity" if cost is PERPLEXITY_COST else cost.name
    return f" (a difference of {abs(paired.mean):.1e} ± {paired.error:.1e} in {what}, over the same windows)"


def _quality(ship: ResultRow, bounds: Sequence[QualityBound]) -> Iterable[str]:
    cost = bounds[0].cost if bounds else first_known_cost(ship)
    if cost is None or ship.is_baseline or cost.value(ship) is None:
        return
    noise = f", {NOT_DISTINGUISHABLE} from the baseline" if is_noise(cost.metric, ship) else ""
    yield f"Its {cost.name} is {cost.show_with_error(ship)}{noise}"
    for name, text in (ship.details.more_texts or {}).items():
        value = cost.on_text(text.quality)
        if value is not None:
            yield f"On {name} it is {cost.show_with(value, cost.error_on_text(text.quality))}"
    for bound in bounds:
        value, error = bound.cost.value(ship), bound.cost.error(ship)
        if value is not None and error is not None and bound.limit - value < error:
            yield f"Its {bound.cost.name} is closer to the bound than its standard error, so it may be over the bound"


def _speed(ship: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    rate, verb = next(((metric, verb) for metric, verb in _RATES if metric.value(ship) is not None), (None, ""))
    ratio = None if rate is None else ratio_of(rate, ship, baseline)
    if rate is None or baseline is None or ratio is None:
        return
    if same_speed(rate, ship, baseline) and not is_about_equal(rate, ship, baseline):
        yield f"It {verb} at {show_ratio(ratio)} of the baseline's rate, but the rounds do not confirm a difference"
    elif same_speed(rate, ship, baseline):
        yield f"Its speed is {NOT_DISTINGUISHABLE} from the baseline's"
    else:
        yield f"It {verb} at {show_ratio(ratio)} of the baseline's rate"


def _why_unquantized(group: Group, ship: ResultRow, rejected: Mapping[str, Sequence[str]]) -> Iterable[str]:
    if ship.is_baseline:
        for row in group.rows:
            if row.job_id in rejected:
                yield f"{_name(row)} does not qualify: {'; '.join(rejected[row.job_id])}"


def _worse_on_further_texts(group: Group, ship: ResultRow, bounds: Sequence[QualityBound]) -> Iterable[str]:
    """Yield the rows that would qualify by the first text alone. Those of a baseline are listed anyway."""
    for row in group.rows if not ship.is_baseline else ():
        broken = [reason for bound in bounds for reason in bound.broken_on_further_texts(row)]
        if broken and not any(bound.broken_on_first_text(row) for bound in bounds):
            yield f"{_name(row)} is within the bound on the first text only: {'; '.join(broken)}"


def _scope(ship: ResultRow) -> str:
    positions, further = ship.details.quality.rows, list(ship.details.more_texts or {})
    texts = f"the first text, and on {' and '.join(further)}" if further else "one text"
    text = f", over {positions:,} positions of {texts}" if positions else ""
    if MeasuredPart.SPEED not in ship.protocol.parts:
        return f"It was measured on {ship.device_name}{text}; other texts may give other results"
    batch = ship.protocol.batch_size
    others = f"other devices{',' if text else ' and'} batch sizes{' and texts' if text else ''}"
    return f"It was measured on {ship.device_name} at batch {batch}{text}; {others} may give other results"

"""Which of a group's configurations to ship, in a sentence that says why, and how far it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qbatch.views.comparison import Preference
from qbatch.views.figures import Row, dig
from qbatch.views.groups import Group
from qbatch.views.noise import NOT_DISTINGUISHABLE, is_noise, same_speed
from qbatch.views.quality_loss import KL, LOSSES, PERPLEXITY, Bound, measured_loss, own_loss, same_loss, value_of
from qbatch.views.quantized_share import audit_warnings, defects
from qbatch.views.scheme import is_baseline, show_scheme
from qbatch.views.units import show_bytes, show_ratio

_RATES = {"decode_tokens_per_s": "decodes", "forward_samples_per_s": "passes its input"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """``ship`` None: nothing qualifies. ``rejected``: for each job id the reasons; ``alike``: the job ids that cannot
    be told from ``ship`` by what is preferred."""

    ship: Row | None
    sentence: str
    bounds: Sequence[str]
    rejected: Mapping[str, Sequence[str]]
    alike: Sequence[str] = ()


def recommend(group: Group, preference: Preference) -> Recommendation:
    """The configuration of ``group`` to ship."""
    bounds = _bounds(group.rows, preference)
    said = [str(bound) for bound in bounds]
    if preference.max_weights_bytes is not None:
        said.append(f"weights of at most {show_bytes(preference.max_weights_bytes)}")
    rejected = {row["job_id"]: found for row in group.rows if (found := list(_reasons(row, bounds, preference)))}
    fit = [row for row in group.rows if row["job_id"] not in rejected]
    if not fit:
        return Recommendation(ship=None, sentence=_nothing(group, rejected), bounds=said, rejected=rejected)
    ship, alike = _choose(fit, preference)
    sentence = _sentence(group, ship, alike, bounds, said, rejected, preference)
    return Recommendation(
        ship=ship, sentence=sentence, bounds=said, rejected=rejected, alike=[row["job_id"] for row in alike]
    )


def _bounds(rows: Sequence[Row], preference: Preference) -> list[Bound]:
    asked = [
        Bound(loss=loss, limit=limit, is_default=False)
        for loss, limit in ((KL, preference.max_kl), (PERPLEXITY, preference.max_ppl_ratio))
        if limit is not None
    ]
    if asked or preference.prefer == "quality":
        return asked
    loss = measured_loss(rows)
    return [] if loss is None else [Bound(loss=loss, limit=loss.default, is_default=True)]


def _reasons(row: Row, bounds: Sequence[Bound], preference: Preference) -> Iterable[str]:
    """Why a row does not qualify."""
    yield from defects(row)
    yield from (said for bound in bounds if (said := bound.broken_by(row)) is not None)
    if preference.max_weights_bytes is not None and row["weights_bytes"] > preference.max_weights_bytes:
        yield f"its weights, {show_bytes(row['weights_bytes'])}, are over {show_bytes(preference.max_weights_bytes)}"
    if preference.prefer == "speed" and rate_key(row) is None:
        yield "its speed was not measured"
    if preference.prefer == "quality" and not bounds and not is_baseline(row) and own_loss(row) is None:
        yield "its quality against the baseline was not measured"


def rate_key(row: Row) -> str | None:
    return next((key for key in _RATES if row.get(key) is not None), None)


# The choice: (the row, those that cannot be told from it)


def _choose(fit: Sequence[Row], preference: Preference) -> tuple[Row, list[Row]]:
    if preference.prefer == "speed":
        return _fastest(fit)
    if preference.prefer == "quality":
        return _nearest([row for row in fit if not is_baseline(row)] or fit)
    least = min(row["weights_bytes"] for row in fit)
    return _nearest([row for row in fit if row["weights_bytes"] == least])


def _fastest(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    best = max(rows, key=lambda row: row[rate_key(row) or ""])
    alike = [row for row in rows if row is best or same_speed(rate_key(best) or "", best, row)]
    return _smallest_of(alike)


def _nearest(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    loss = next((loss for loss in LOSSES if all(is_baseline(row) or loss.of(row) is not None for row in rows)), None)
    if loss is None or len(rows) == 1:
        return rows[0], []
    best = min(rows, key=lambda row: value_of(loss, row))
    return _smallest_of([row for row in rows if row is best or same_loss(loss, best, row)])


def _smallest_of(alike: Sequence[Row]) -> tuple[Row, list[Row]]:
    ship = min(alike, key=lambda row: row["weights_bytes"])
    return ship, [row for row in alike if row is not ship]


# The sentence


def _name(row: Row) -> str:
    return f"{show_scheme(row)} ({row['job_id']})"


def _nothing(group: Group, rejected: Mapping[str, Sequence[str]]) -> str:
    each = (f"{_name(row)}: {', '.join(rejected[row['job_id']])}" for row in group.rows)
    return f"Nothing qualifies: {'; '.join(each)}."


def _sentence(
    group: Group,
    ship: Row,
    alike: Sequence[Row],
    bounds: Sequence[Bound],
    said: Sequence[str],
    rejected: Mapping[str, Sequence[str]],
    preference: Preference,
) -> str:
    baseline = group.baselines.get(ship["job_id"])
    clauses = [
        f"Ship {_name(ship)}: {_reason(ship, baseline, said, preference)}{', as far as can be told' if alike else ''}",
        *_alike(ship, alike, preference),
        *_quality(ship, bounds),
        *_speed(ship, baseline),
        *_why_unquantized(group, ship, rejected),
        *audit_warnings(ship),
        _scope(ship),
    ]
    return "; ".join(clauses) + "."


def _reason(ship: Row, baseline: Row | None, said: Sequence[str], preference: Preference) -> str:
    within = f" within {' and '.join(said)}" if said else ""
    if preference.prefer == "speed":
        return f"the highest rate measured{within}"
    if preference.prefer == "quality":
        nearest = "the unquantized model itself" if is_baseline(ship) else "the quantized model nearest to its baseline"
        return f"{nearest}{within}"
    of_base = "" if baseline is None else f", {show_ratio(ship['weights_bytes'] / baseline['weights_bytes'])}"
    return f"the smallest weights ({show_bytes(ship['weights_bytes'])}{of_base}){within}"


def _alike(ship: Row, alike: Sequence[Row], preference: Preference) -> Iterable[str]:
    if alike:
        others = " and ".join(_name(row) for row in alike)
        what = "speed" if preference.prefer == "speed" else "quality"
        smaller = ", and is the smaller" if any(row["weights_bytes"] > ship["weights_bytes"] for row in alike) else ""
        yield f"in {what} it is {NOT_DISTINGUISHABLE} from {others}{smaller}"


def _quality(ship: Row, bounds: Sequence[Bound]) -> Iterable[str]:
    loss = bounds[0].loss if bounds else own_loss(ship)
    if loss is None or is_baseline(ship) or loss.of(ship) is None:
        return
    noise = f", {NOT_DISTINGUISHABLE} from the baseline itself" if is_noise(loss.key, ship) else ""
    yield f"its {loss.name} is {loss.show_with_error(ship)}{noise}"
    for bound in bounds:
        lost, margin = bound.loss.of(ship), bound.loss.error(ship)
        if lost is not None and margin is not None and bound.limit - lost < margin:
            yield f"its {bound.loss.name} is within its standard error of the bound, so that it may well be over it"


def _speed(ship: Row, baseline: Row | None) -> Iterable[str]:
    key = rate_key(ship)
    if key is None or baseline is None or not baseline.get(key):
        return
    if same_speed(key, ship, baseline):
        yield f"in speed it is {NOT_DISTINGUISHABLE} from the baseline"
    else:
        yield f"it {_RATES[key]} at {show_ratio(ship[key] / baseline[key])} of the baseline's rate"


def _why_unquantized(group: Group, ship: Row, rejected: Mapping[str, Sequence[str]]) -> Iterable[str]:
    if is_baseline(ship):
        for row in group.rows:
            if row["job_id"] in rejected:
                yield f"{_name(row)} does not qualify: {', '.join(rejected[row['job_id']])}"


def _scope(ship: Row) -> str:
    positions = dig(ship, "details.quality.rows")
    text = f", over {positions:,} positions of one text" if positions else ""
    batch = dig(ship, "protocol.batch_size")
    return f"measured on {ship['device_name']} at batch {batch}{text}, which says nothing of others"

"""What a search found: its mixtures, and how sensitive each group of layers is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.frontier import FrontierPoint
from qbatch.core.search.sensitivity import Estimate, GroupSensitivity, Sensitivity
from qbatch.views.formats import GAP, NOTHING, Column, Row, render, text_width
from qbatch.views.noise import NOISE_MARK
from qbatch.views.units import show_bytes, show_duration, show_nats

_BAR = 24
# What is shown of a search of which not everything is asked for.
_POINTS, _EVEN, _LAYERS, _GROUPS = 16, 8, 12, 8
_SHADES = "▁▂▃▄▅▆▇█"
_ELSEWHERE = "elsewhere"


def frontier_table(found: FinishedSearch, published: Mapping[int, str], *, in_full: bool) -> list[str]:
    """A line for each mixture, with its KL drawn; of many, unless ``in_full``, for those that were published and some
    others. ``published``: by point, the job that publishes it."""
    points = found.frontier.points
    most = max((point.kl.mean for point in points), default=0.0)
    is_whole = in_full or len(points) <= _POINTS
    shown = range(len(points)) if is_whole else _some(len(points), published)
    rows = [_point(index, points[index], most, published.get(index)) for index in shown]
    if is_whole:
        return render(rows, _FRONTIER, "table").splitlines()
    # What one adds to the one before it says nothing where that one is not shown.
    table = render(rows, [column for column in _FRONTIER if column.key != "added"], "table").splitlines()
    return [*table, f"and {len(points) - len(rows)} more (--all)"]


def _some(count: int, published: Collection[int]) -> list[int]:
    """The first and the last point, those that were published with their neighbours, and others at equal distances."""
    near = {point + step for point in published for step in (-1, 0, 1)}
    even = {round(number * (count - 1) / _EVEN) for number in range(_EVEN + 1)}
    return sorted(point for point in near | even if 0 <= point < count)


def _point(index: int, point: FrontierPoint, most: float, job_id: str | None) -> dict[str, Any]:
    share = point.kl.mean / most if most > 0 else 0.0
    return {
        "point": index,
        "layers": len(point.modules),
        "weights": show_bytes(point.weights_bytes),
        "kl": show_estimate(point.kl) + ("" if point.same_as is None else f" {NOISE_MARK} {point.same_as}"),
        "drawn": "█" * round(_BAR * max(0.0, share)),
        "added": ", ".join(point.added) or "everything quantized",
        "job": job_id,
    }


_FRONTIER: tuple[Column, ...] = (
    Column(key="point", title="mixture"),
    Column(key="layers", title="layers at 16 bits"),
    Column(key="weights", title="weights"),
    Column(key="kl", title="KL"),
    Column(key="drawn", title="", spare=True),
    Column(key="job", title="published by", spare=True, kept=True),
    Column(key="added", title="adds", wraps=True, spare=True),
)


def show_estimate(figure: Estimate) -> str:
    """``4.0e-03 ± 2.0e-04``"""
    error = figure.standard_error
    return show_nats(figure.mean) if error is None else f"{show_nats(figure.mean)} ± {show_nats(error)}"


def sensitivity_lines(found: FinishedSearch, width: int, *, in_full: bool) -> list[str]:
    """What each group of layers gains at 16 bits, in tables that fit ``width``; unless ``in_full``, of many groups the
    most promising ones alone."""
    tables = _sensitivity_tables(found, width)
    fits = len(tables) == 1 and len(tables[0]) <= _LAYERS + 2
    if not in_full and not fits:
        return _most_sensitive(found)
    return [line for number, table in enumerate(tables) for line in ([""] if number else []) + table]


def _most_sensitive(found: FinishedSearch) -> list[str]:
    sensitivity = found.sensitivity
    ranked = sorted(sensitivity.groups, key=sensitivity.gain_per_byte, reverse=True)
    most = max(map(sensitivity.gain_per_byte, ranked[:1]), default=0.0)
    rows = [
        {
            "group": each.group.name,
            "gain": _gain(sensitivity, each, most),
            "bytes": show_bytes(each.group.extra_bytes),
        }
        for each in ranked[:_GROUPS]
    ]
    more = [f"and {len(ranked) - len(rows)} more groups (--all)"] if len(rows) < len(ranked) else []
    return [*render(rows, _MOST_SENSITIVE, "table").splitlines(), *more]


_MOST_SENSITIVE: tuple[Column, ...] = (
    Column(key="group", title="the most per byte", wraps=True),
    Column(key="gain", title="KL gained"),
    Column(key="bytes", title="costs"),
)


def _sensitivity_tables(found: FinishedSearch, width: int) -> list[list[str]]:
    """A line for each repeated block, and in it what each group of layers gains at 16 bits; as many tables as it takes
    to fit ``width``."""
    sensitivity = found.sensitivity
    kinds: dict[str, None] = {}
    layers: dict[str, dict[str, GroupSensitivity]] = {}
    for each in sorted(sensitivity.groups, key=lambda each: _in_order(each.group.name)):
        layer = each.group.layer or _ELSEWHERE
        kind = each.group.name.removeprefix(f"{each.group.layer}.") if each.group.layer else each.group.name
        kinds.setdefault(kind)
        layers.setdefault(layer, {})[kind] = each
    most = max((sensitivity.gain_per_byte(each) for each in sensitivity.groups), default=0.0)
    rows = [
        {"layer": layer, **{kind: _gain(sensitivity, each, most) for kind, each in groups.items()}}
        for layer, groups in layers.items()
    ]
    return [_sensitivity_table(rows, some) for some in _fitting(rows, list(kinds), width)]


def _fitting(rows: Sequence[Row], kinds: Sequence[str], width: int) -> list[list[str]]:
    """``kinds`` in runs whose columns fit ``width`` beside that of the layers; each has at least one."""
    first = max((text_width(str(row["layer"])) for row in rows), default=0)
    runs: list[list[str]] = []
    left = 0
    for kind in kinds:
        column = max(text_width(kind), *(text_width(row.get(kind, NOTHING)) for row in rows)) + len(GAP)
        if not runs or column > left:
            runs.append([])
            left = width - first
        runs[-1].append(kind)
        left -= column
    return runs


def _sensitivity_table(rows: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    columns = [Column(key="layer", title="layer"), *(Column(key=kind, title=kind) for kind in kinds)]
    whole = [{column.key: row.get(column.key) for column in columns} for row in rows]
    return render(whole, columns, "table").splitlines()


def _in_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Layer 2 before layer 10."""
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))


def _gain(sensitivity: Sensitivity, each: GroupSensitivity, most: float) -> str:
    """``▆ 1.2e-03``, with ``~`` where it follows from the derivative."""
    per_byte = sensitivity.gain_per_byte(each)
    share = per_byte / most if most > 0 else 0.0
    shade = _SHADES[min(len(_SHADES) - 1, max(0, round(share * (len(_SHADES) - 1))))]
    return f"{shade} {'' if each.measured is not None else '~'}{show_nats(sensitivity.gain(each))}"


def search_lines(found: FinishedSearch) -> list[tuple[str, str]]:
    """What was measured, as (title, text)."""
    sensitivity, frontier = found.sensitivity, found.frontier
    passes = sensitivity.forward_passes + frontier.forward_passes
    lines = [
        ("text", f"{sensitivity.windows} windows, {sensitivity.rows} tokens"),
        ("quantized", f"KL {show_estimate(sensitivity.kl)} with no layer at 16 bits"),
        ("took", f"{show_duration(found.seconds)} on {found.device_name}, {passes:.1f} passes through the model"),
    ]
    if frontier.floor_kl is not None:
        floor = (
            f"KL {show_nats(frontier.floor_kl)}; mixtures that are not above it cannot be told apart, and no more are "
            "sought"
        )
        lines.append(("16-bit rounding", floor))
    if any(point.same_as is not None for point in frontier.points):
        alike = f"{NOISE_MARK} n: its KL cannot be told from that of mixture n, so the smaller one is preferred"
        lines.append(("alike", alike))
    if sensitivity.rank_correlation is not None:
        ranks = (
            f"{sensitivity.rank_correlation:.2f} between derivatives and {sensitivity.compared_groups} measured gains"
        )
        lines.append(("rank correlation", ranks))
    elif sensitivity.why_no_derivative is None:
        some, every = sensitivity.compared_groups, len(sensitivity.groups)
        lines.append(("rank correlation", f"unknown: gains were measured of {some} of {every} groups, too few to rank"))
    if sensitivity.why_no_derivative is not None:
        lines.append(("no derivatives", sensitivity.why_no_derivative))
    if sensitivity.unreached:
        lines.append(("not reached", f"{', '.join(sensitivity.unreached)}: the text does not get there; quantized"))
    return lines

"""What a search found: its mixtures, and how sensitive each group of layers is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbatch.core.search.finished_search import FinishedSearch
from qbatch.core.search.frontier import FrontierPoint
from qbatch.core.search.sensitivity import Estimate, GroupSensitivity, Sensitivity
from qbatch.views.formats import Column, render
from qbatch.views.noise import NOISE_MARK
from qbatch.views.units import show_bytes, show_duration, show_nats

_BAR = 24
_SHADES = "▁▂▃▄▅▆▇█"
_ELSEWHERE = "elsewhere"


def frontier_table(found: FinishedSearch, published: Mapping[int, str]) -> list[str]:
    """A line for each mixture, with its KL drawn. ``published``: by point, the job that publishes it."""
    points = found.frontier.points
    most = max((point.kl.mean for point in points), default=0.0)
    rows = [_point(index, point, most, published.get(index)) for index, point in enumerate(points)]
    return render(rows, _FRONTIER, "table").splitlines()


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
    Column(key="drawn", title=""),
    Column(key="job", title="published by", spare=True),
    Column(key="added", title="adds", wraps=True, spare=True),
)


def show_estimate(figure: Estimate) -> str:
    """``4.0e-03 ± 2.0e-04``"""
    error = figure.standard_error
    return show_nats(figure.mean) if error is None else f"{show_nats(figure.mean)} ± {show_nats(error)}"


def sensitivity_table(found: FinishedSearch) -> list[str]:
    """A line for each repeated block, and in it what each group of layers gains at 16 bits."""
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
        floor = f"KL {show_nats(frontier.floor_kl)}; mixtures that are not above it are alike, and no more are sought"
        lines.append(("16-bit rounding", floor))
    if any(point.same_as is not None for point in frontier.points):
        alike = f"{NOISE_MARK} n: its KL cannot be told from that of mixture n, so the smaller one is preferred"
        lines.append(("alike", alike))
    if sensitivity.rank_correlation is not None:
        ranks = (
            f"{sensitivity.rank_correlation:.2f} between derivatives and {sensitivity.compared_groups} measured gains"
        )
        lines.append(("rank correlation", ranks))
    if sensitivity.why_no_derivative is not None:
        lines.append(("no derivatives", sensitivity.why_no_derivative))
    if sensitivity.unreached:
        lines.append(("not reached", f"{', '.join(sensitivity.unreached)}: the text does not get there; quantized"))
    return lines

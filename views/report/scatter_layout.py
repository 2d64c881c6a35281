"""Where everything of a scatter chart is drawn, in units of its view box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.views.report.chart_data import ScatterData, ScatterPoint
from qbatch.views.report.log_axis import LogAxis, Tick, show_round_bytes, ticks
from qbatch.views.report.speed_colour import speed_colour

MARKERS = (
    "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0Z",  # circle
    "M-5 -5H5V5H-5Z",  # square
    "M0 -6.5L6 4.5H-6Z",  # triangle
    "M0 -7L7 0L0 7L-7 0Z",  # diamond
    "M0 6.5L6 -4.5H-6Z",  # triangle, downwards
    "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",  # plus
)
_CHARACTER_WIDTH = 7.2
_LABEL_HEIGHT = 13.0
_LONGEST_LABEL = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartSize:
    """``name`` is its class in the page's style, which shows the one that fits."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


WIDE = ChartSize(name="wide", width=1040, height=470, left=76, right=24, top=18, bottom=56)
NARROW = ChartSize(name="narrow", width=360, height=400, left=54, right=12, top=14, bottom=52)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPoint:
    """``error``: the upper and the lower end of its standard error."""

    x: float
    y: float
    marker: str
    colour: str
    text: str
    is_pick: bool
    error: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedText:
    x: float
    y: float
    anchor: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterLayout:
    """``paths``: for each model, a line through its points."""

    size: ChartSize
    x_axis: LogAxis
    y_axis: LogAxis
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    limits: Sequence[Tick]
    points: Sequence[PlacedPoint]
    paths: Sequence[str]
    labels: Sequence[PlacedText]


def scatter_layout(data: ScatterData, size: ChartSize) -> ScatterLayout:
    x_axis = LogAxis.around(
        (point.weights_bytes for point in data.points), start=size.left, end=size.width - size.right
    )
    costs = [*(point.cost for point in data.points), *data.limits]
    y_axis = LogAxis.around((cost for cost in costs if cost > 0), start=size.height - size.bottom, end=size.top)
    points = [_placed(point, data, x_axis, y_axis) for point in data.points]
    return ScatterLayout(
        size=size,
        x_axis=x_axis,
        y_axis=y_axis,
        x_ticks=ticks(x_axis, x_axis.binary_ticks(), show_round_bytes),
        y_ticks=ticks(y_axis, y_axis.decimal_ticks(), lambda value: f"{value:g}"),
        limits=ticks(y_axis, (limit for limit in data.limits if limit > 0), lambda value: f"limit {value:g}"),
        points=points,
        paths=list(_paths(data.points, points)),
        labels=_labels(data.points, points, size),
    )


def _placed(point: ScatterPoint, data: ScatterData, x_axis: LogAxis, y_axis: LogAxis) -> PlacedPoint:
    error = point.error
    # An error as large as the value reaches below the axis.
    lowest = y_axis.low if error is None else max(y_axis.low, point.cost - error)
    ends = None if error is None else (y_axis.position(point.cost + error), y_axis.position(lowest))
    return PlacedPoint(
        x=x_axis.position(point.weights_bytes),
        y=y_axis.position(point.cost),
        marker=MARKERS[data.schemes.index(point.label.scheme) % len(MARKERS)],
        colour=speed_colour(point.speed).name,
        text=point.text,
        is_pick=point.is_pick,
        error=ends,
    )


def _by_model(points: Sequence[ScatterPoint], placed: Sequence[PlacedPoint]) -> dict[str, list[PlacedPoint]]:
    models: dict[str, list[PlacedPoint]] = {}
    for point, where in zip(points, placed, strict=True):
        models.setdefault(point.label.model, []).append(where)
    return models


def _paths(points: Sequence[ScatterPoint], placed: Sequence[PlacedPoint]) -> Iterable[str]:
    for members in _by_model(points, placed).values():
        if len(members) > 1:
            ordered = sorted(members, key=lambda one: (one.x, one.y))
            yield "M" + "L".join(f"{one.x} {one.y}" for one in ordered)


def _labels(points: Sequence[ScatterPoint], placed: Sequence[PlacedPoint], size: ChartSize) -> list[PlacedText]:
    """The names of models beside one of their points each, as far as they fit without touching anything."""
    taken = [(one.x - 7, one.y - 7, one.x + 7, one.y + 7) for one in placed]
    labels: list[PlacedText] = []
    for model, members in _by_model(points, placed).items():
        text = _short_name(model)
        for label in (label for one in _best_first(members) for label in _around(one, text)):
            box = label_box(label)
            if _is_inside(box, size) and not any(is_overlap(box, other) for other in taken):
                taken.append(box)
                labels.append(label)
                break
    return labels


def _short_name(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"


def _best_first(members: Sequence[PlacedPoint]) -> list[PlacedPoint]:
    return sorted(members, key=lambda one: (not one.is_pick, one.x))


def _around(point: PlacedPoint, text: str) -> Iterable[PlacedText]:
    for across, down, anchor in ((14, 4, "start"), (-14, 4, "end"), (0, -15, "middle"), (0, 24, "middle")):
        yield PlacedText(x=round(point.x + across, 1), y=round(point.y + down, 1), anchor=anchor, text=text)


Box = tuple[float, float, float, float]


def label_box(label: PlacedText) -> Box:
    """Left, top, right and bottom of a name, about as wide as it will be."""
    width = len(label.text) * _CHARACTER_WIDTH
    left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return (left, label.y - _LABEL_HEIGHT + 3, left + width, label.y + 3)


def _is_inside(box: Box, size: ChartSize) -> bool:
    left, top, right, bottom = box
    return (
        left > size.left and right < size.width - size.right and top > size.top and bottom < size.height - size.bottom
    )


def is_overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

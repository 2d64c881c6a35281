"""Where everything of the chart of speeds is drawn, in units of its view box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qbatch.views.report.chart_data import SpeedLine
from qbatch.views.report.log_axis import LogAxis, Tick, ticks
from qbatch.views.report.relative_speed import RelativeSpeed
from qbatch.views.report.scatter_layout import ChartSize

MOST_LINES = 40
WIDE = ChartSize(name="wide", width=1040, height=0, left=330, right=24, top=12, bottom=52)
NARROW = ChartSize(name="narrow", width=360, height=0, left=14, right=14, top=8, bottom=50)
_LINE_HEIGHT = {"wide": 26, "narrow": 42}
_CHARACTER_WIDTH = 6.4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSpeed:
    x: float
    is_same: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSpeedLine:
    """``y``: of its dots; its label stands beside them, or above them where the chart is narrow."""

    y: float
    label_y: float
    label: str
    is_pick: bool
    decode: PlacedSpeed | None
    prefill: PlacedSpeed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedLayout:
    """``one``: where the baseline's speed stands."""

    size: ChartSize
    height: int
    one: float
    x_ticks: Sequence[Tick]
    lines: Sequence[PlacedSpeedLine]


def speed_layout(lines: Sequence[SpeedLine], size: ChartSize) -> SpeedLayout:
    factors = [speed.factor for line in lines for speed in line.speeds]
    axis = LogAxis.around([1.0, *factors], start=size.left, end=size.width - size.right)
    step = _LINE_HEIGHT[size.name]
    return SpeedLayout(
        size=size,
        height=size.top + step * len(lines) + size.bottom,
        one=axis.position(1.0),
        x_ticks=ticks(axis, sorted({*axis.decimal_ticks(), 1.0}), lambda value: f"×{value:g}"),
        lines=[_placed(line, number, axis, size, step) for number, line in enumerate(lines)],
    )


def _placed(line: SpeedLine, number: int, axis: LogAxis, size: ChartSize, step: int) -> PlacedSpeedLine:
    y = size.top + step * number + step / 2
    above = size.name == "narrow"
    return PlacedSpeedLine(
        y=y + (9 if above else 0),
        label_y=y - 7 if above else y + 4,
        label=_label(line, (size.width if above else size.left) - 24),
        is_pick=line.is_pick,
        decode=_speed(line.decode, line, axis),
        prefill=_speed(line.prefill, line, axis),
    )


def _speed(speed: RelativeSpeed | None, line: SpeedLine, axis: LogAxis) -> PlacedSpeed | None:
    if speed is None:
        return None
    label = line.label
    text = f"{label.model}, {label.scheme} ({label.job_id})\n{speed.text}"
    return PlacedSpeed(x=axis.position(speed.factor), is_same=speed.is_same, text=text)


def _label(line: SpeedLine, width: float) -> str:
    """The model's last name and the scheme. The name is shortened so that they fit."""
    setting = f", {line.label.setting}" if line.label.setting else ""
    scheme = f" · {line.label.scheme}{setting}"
    room = max(8, int(width / _CHARACTER_WIDTH) - len(scheme))
    name = line.label.model.rstrip("/").rsplit("/", 1)[-1]
    return (name if len(name) <= room else f"{name[: room - 1]}…") + scheme

"""What the charts of a report show, before it is decided where on a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.noise import is_noise
from qbatch.views.quality_bounds import QualityCost, first_known_cost
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.report.relative_speed import FIRST_PASS, RATE, RelativeSpeed, relative_speed
from qbatch.views.report.report_table import RowLabel
from qbatch.views.units import show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterPoint:
    """A quantized row: its weights against what it costs in quality beyond the baseline, with the standard error of
    that where it is known."""

    label: RowLabel
    weights_bytes: int
    cost: float
    error: float | None
    speed: RelativeSpeed | None
    is_pick: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterData:
    """Rows of one device and protocol whose quality is measured in one way. ``limits``: bounds that decided, as costs
    beyond the baseline."""

    cost: QualityCost
    setting: str
    points: Sequence[ScatterPoint]
    limits: Sequence[float]

    @property
    def title(self) -> str:
        """``mean KL, nats``"""
        beyond = f" − {self.cost.none:g}" if self.cost.none else ""
        return f"{self.cost.name}{beyond}{',' if self.cost.suffix else ''}{self.cost.suffix}"

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(point.label.scheme for point in self.points))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedLine:
    """A quantized row's speed beside its baseline's: decoding, and the pass over the prompt."""

    label: RowLabel
    decode: RelativeSpeed | None
    prefill: RelativeSpeed | None
    is_pick: bool

    @property
    def speeds(self) -> list[RelativeSpeed]:
        return [speed for speed in (self.decode, self.prefill) if speed is not None]


def scatter_charts(groups: Iterable[JudgedGroup]) -> list[ScatterData]:
    """A chart for each device, protocol and way to measure quality. What is zero or unknown has no place on one."""
    found: dict[tuple[str, str, str], tuple[QualityCost, JudgedGroup, list[ScatterPoint], dict[float, None]]] = {}
    for judged in groups:
        for row in judged.group.rows:
            cost = None if row.is_baseline else first_known_cost(row)
            point = None if cost is None else _point(cost, row, judged)
            if cost is None or point is None:
                continue
            key = (judged.group.device_name, str(row.protocol_hash), cost.name)
            *_, points, limits = found.setdefault(key, (cost, judged, [], {}))
            points.append(point)
            limits.update(dict.fromkeys(bound.limit - cost.none for bound in judged.bounds if bound.cost is cost))
    return [
        ScatterData(cost=cost, setting=judged.setting, points=points, limits=list(limits))
        for cost, judged, points, limits in found.values()
    ]


def _point(cost: QualityCost, row: ResultRow, judged: JudgedGroup) -> ScatterPoint | None:
    value, error = cost.value(row), cost.error(row)
    if value is None or not math.isfinite(value) or value <= cost.none or not row.weights_bytes:
        return None
    label, speed = RowLabel.of(judged, row), relative_speed(RATE, row, judged.baseline(row))
    noise = ", not distinguishable from the baseline" if is_noise(cost.metric, row) else ""
    lines = [
        f"{label.model}, {label.scheme} ({label.job_id})",
        f"weights {show_bytes(row.weights_bytes)}",
        f"{cost.name} {cost.show_with_error(row)}{noise}",
        "speed unknown" if speed is None else speed.text,
        *(["recommended"] if judged.is_pick(row) else []),
    ]
    return ScatterPoint(
        label=label,
        weights_bytes=row.weights_bytes,
        cost=value - cost.none,
        error=error if error is not None and math.isfinite(error) else None,
        speed=speed,
        is_pick=judged.is_pick(row),
        text="\n".join(lines),
    )


def speed_lines(groups: Iterable[JudgedGroup]) -> list[SpeedLine]:
    """A line for each quantized row with a speed that can be compared with the baseline's."""
    lines = [
        SpeedLine(
            label=RowLabel.of(judged, row),
            decode=relative_speed(RATE, row, judged.baseline(row)),
            prefill=relative_speed(FIRST_PASS, row, judged.baseline(row)),
            is_pick=judged.is_pick(row),
        )
        for judged in groups
        for row in judged.group.rows
        if not row.is_baseline
    ]
    return [line for line in lines if line.speeds]

"""How fast a row is beside its baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qbatch.core.measured.metric import Better, MetricColumn
from qbatch.core.measured.metrics import DECODE, FORWARD, PREFILL, THROUGHPUT
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.metric_text import show_metric
from qbatch.views.noise import is_noise
from qbatch.views.ratios import may_compare, ratio_of, show_relative

RATE = MetricColumn(metrics=(DECODE, THROUGHPUT))
FIRST_PASS = MetricColumn(metrics=(PREFILL, FORWARD))


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeSpeed:
    """``factor``: 2 is twice as fast, whether the figure is a rate or a time. ``is_same``: not distinguishable."""

    factor: float
    is_same: bool
    text: str


def relative_speed(column: MetricColumn, row: ResultRow, baseline: ResultRow | None) -> RelativeSpeed | None:
    """How much faster ``row`` is than its baseline in this column; None if the two cannot be compared."""
    metric = column.metric_of(row)
    if metric is None or baseline is None or not may_compare(row, baseline, on_device=metric.on_device):
        return None
    ratio = ratio_of(metric, row, baseline)
    if ratio is None or not math.isfinite(ratio) or ratio <= 0:
        return None
    return RelativeSpeed(
        factor=ratio if metric.better is Better.HIGHER else 1 / ratio,
        is_same=is_noise(metric, row, baseline),
        text=f"{metric.line_title} {show_metric(metric, row)} {show_relative(column, row, baseline)}".rstrip(),
    )

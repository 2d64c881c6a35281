"""Format the values of metrics as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from qbatch.core.measured.metric import BaselineComparison, Metric, MetricColumn, Unit
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import NOTHING
from qbatch.views.units import (
    show_bytes,
    show_change,
    show_float,
    show_nats,
    show_percent,
    show_rate,
    show_ratio,
    show_seconds,
)


def show_value(unit: Unit, value: float) -> str:
    match unit:
        case Unit.BITS:
            return f"{value:.2f}"
        case Unit.BYTES:
            return show_bytes(int(value))
        case Unit.CORRELATION:
            return f"{value:.4f}"
        case Unit.JOULES:
            return f"{show_float(value, 3)} J"
        case Unit.NATS | Unit.PROBABILITY:
            return show_nats(value)
        case Unit.PLAIN:
            return show_float(value)
        case Unit.SAMPLES_PER_S:
            return show_rate(value, "sample")
        case Unit.SECONDS:
            return show_seconds(value)
        case Unit.SHARE:
            return show_percent(value)
        case Unit.TOKENS_PER_S:
            return show_rate(value, "tok")
        case _:
            assert_never(unit)


def show_relative_value(comparison: BaselineComparison, ratio: float) -> str:
    """The text after a value that is ``ratio`` times its baseline's: ``×0.57``, ``+0.8 %``, or ""."""
    match comparison:
        case BaselineComparison.NOTHING:
            return ""
        case BaselineComparison.RATIO:
            return show_ratio(ratio)
        case BaselineComparison.CHANGE:
            return show_change(ratio)
        case _:
            assert_never(comparison)


def show_metric(metric: Metric, row: ResultRow) -> str:
    value = metric.value(row)
    return NOTHING if value is None else show_value(metric.unit, value)


def show_column(column: MetricColumn, row: ResultRow) -> str:
    metric = column.metric_of(row)
    return NOTHING if metric is None else show_metric(metric, row)


def column_title(column: MetricColumn, rows: Iterable[ResultRow]) -> str:
    """The labels of the column's metrics that ``rows`` have, joined by a slash; "" if they have none."""
    present = [metric.key for row in rows if (metric := column.metric_of(row)) is not None]
    return "/".join(metric.label for metric in column.metrics if metric.key in present)

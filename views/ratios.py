"""A metric beside its baseline's, where the two may be set side by side."""

from __future__ import annotations

from qbatch.core.measured.metrics import BesideBaseline, Metric, MetricColumn
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.metric_text import show_beside_value
from qbatch.views.noise import NOISE_MARK, is_noise


def ratio_of(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> float | None:
    """``row``'s value over its baseline's; None where there is none, or nothing is shown beside it."""
    if metric.beside is BesideBaseline.NOTHING or baseline is None:
        return None
    value, other = metric.value(row), metric.value(baseline)
    return None if value is None or not other else value / other


def show_beside(column: MetricColumn, row: ResultRow, baseline: ResultRow | None) -> str:
    """``×0.57``, with a mark where the difference is noise; "" where there is nothing to compare.

    A ratio wants the baseline's protocol, and for speed and memory its device.
    """
    metric = column.metric_of(row)
    if metric is None:
        return ""
    comparable = baseline is not None and may_compare(row, baseline, on_device=metric.on_device)
    other = baseline if comparable else None
    mark = NOISE_MARK if is_noise(metric, row, other) else ""
    if metric.beside is BesideBaseline.NOTHING:
        # A metric that is a comparison in itself, such as KL.
        return mark
    ratio = ratio_of(metric, row, other)
    return "" if ratio is None else show_beside_value(metric.beside, ratio) + mark


def may_compare(row: ResultRow, baseline: ResultRow, *, on_device: bool) -> bool:
    """Whether two rows were measured by one protocol on one model, and where it matters on one device: under one name
    may have lain several."""
    if row.protocol_hash != baseline.protocol_hash:
        return False
    if row.details.fingerprint != baseline.details.fingerprint:
        return False
    return not on_device or row.device_name == baseline.device_name

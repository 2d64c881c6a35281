"""A metric relative to its baseline's, if the two may be compared."""

from __future__ import annotations

from qbatch.core.measured.metrics import BaselineComparison, Metric, MetricColumn
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.metric_text import show_relative_value
from qbatch.views.noise import NOISE_MARK, is_noise


def ratio_of(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> float | None:
    """``row``'s value divided by its baseline's; None if either is missing, or the metric shows no ratio."""
    if metric.comparison is BaselineComparison.NOTHING or baseline is None:
        return None
    value, other = metric.value(row), metric.value(baseline)
    return None if value is None or not other else value / other


def show_relative(column: MetricColumn, row: ResultRow, baseline: ResultRow | None) -> str:
    """``×0.57``, with a mark if the difference is noise; "" if there is nothing to compare.

    A ratio is only shown for rows of one protocol, and for speed and memory of one device.
    """
    metric = column.metric_of(row)
    if metric is None:
        return ""
    comparable = baseline is not None and may_compare(row, baseline, on_device=metric.on_device)
    compared_with = baseline if comparable else None
    mark = NOISE_MARK if is_noise(metric, row, compared_with) else ""
    if metric.comparison is BaselineComparison.NOTHING:
        # The metric is already a comparison with the baseline, such as KL.
        return mark
    ratio = ratio_of(metric, row, compared_with)
    return "" if ratio is None else show_relative_value(metric.comparison, ratio) + mark


def may_compare(row: ResultRow, baseline: ResultRow, *, on_device: bool) -> bool:
    """Whether two rows were measured under one protocol on the same model content, and ``on_device`` on one device.

    The content is compared too, since the files under one name may have changed.
    """
    if row.protocol_hash != baseline.protocol_hash:
        return False
    if row.details.fingerprint != baseline.details.fingerprint:
        return False
    return not on_device or row.device_name == baseline.device_name

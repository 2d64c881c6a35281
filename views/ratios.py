"""A metric relative to its baseline's, if the two may be compared."""

from __future__ import annotations

from qbatch.core.measured.metric import BaselineComparison, Metric, MetricColumn
from qbatch.core.measured.metrics import DISK
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.metric_text import show_relative_value
from qbatch.views.noise import UNSTEADY_MARK, is_unsteady, noise_mark


def ratio_of(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> float | None:
    """``row``'s value divided by its baseline's; None if either is missing, or the metric shows no ratio."""
    if metric.comparison is BaselineComparison.NOTHING or baseline is None:
        return None
    value, other = metric.value(row), metric.value(baseline)
    return None if value is None or not other else value / other


OTHER_DTYPE_MARK = "†"
"""Beside a ratio of two files whose unquantized weights are not of one dtype."""
# A file has little beside its weights, so one that is this many times as large or small holds another dtype.
_OTHER_DTYPE_FROM = 1.5


def show_relative(column: MetricColumn, row: ResultRow, baseline: ResultRow | None) -> str:
    """``×0.57`` with a mark if the difference is noise, the rounds differ or the files are unlike; "" if there is
    nothing to say.

    A ratio is only shown for rows of one protocol, and for speed and memory of one device.
    """
    metric = column.metric_of(row)
    if metric is None:
        return ""
    comparable = baseline is not None and may_compare(row, baseline, on_device=metric.on_device)
    compared_with = baseline if comparable else None
    mark = _mark(metric, row, compared_with)
    ratio = ratio_of(metric, row, compared_with)
    # A metric without a ratio may be a comparison with the baseline itself, such as KL.
    return mark if ratio is None else show_relative_value(metric.comparison, ratio) + mark


def _mark(metric: Metric, row: ResultRow, baseline: ResultRow | None) -> str:
    is_compared = baseline is not None or metric.comparison is BaselineComparison.NOTHING
    if is_compared and (mark := noise_mark(metric, row, baseline)):
        return mark
    if is_unsteady(metric, row):
        return UNSTEADY_MARK
    is_unlike = metric is DISK and baseline is not None and has_other_dtype_on_disk(baseline)
    return OTHER_DTYPE_MARK if is_unlike else ""


def has_other_dtype_on_disk(baseline: ResultRow) -> bool:
    """Whether the source's files hold another dtype than the one that the baseline has in memory."""
    disk, weights = baseline.disk_bytes, baseline.weights_bytes
    if not disk or not weights:
        return False
    return max(disk / weights, weights / disk) >= _OTHER_DTYPE_FROM


def may_compare(row: ResultRow, baseline: ResultRow, *, on_device: bool) -> bool:
    """Whether two rows were measured under one protocol on the same model content, and ``on_device`` on one device.

    The content is compared too, since the files under one name may have changed.
    """
    if row.protocol_hash != baseline.protocol_hash:
        return False
    if row.details.fingerprint != baseline.details.fingerprint:
        return False
    return not on_device or row.device_name == baseline.device_name

"""The columns that a table of results may have: metrics beside their ratios, and fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qbatch.core.errors import UsageError
from qbatch.core.measured.metric import Metric, MetricColumn
from qbatch.core.measured.metrics import ALL_METRICS, RESULTS_COLUMNS
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import NOTHING, printable, show_plain
from qbatch.views.metric_text import column_title, show_column
from qbatch.views.ratios import show_relative
from qbatch.views.units import show_bytes, show_count, show_percent

Value = Callable[[ResultRow], Any]
LABELS = ("job", "job_id", "model", "scheme")
"""What each row is called by, in every format, whichever columns are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownColumn:
    """A column of a table. ``cell``: a row's figure and its ratio to the baseline. ``title``: of these rows, or "" if
    none of them has a value. ``value``: what programs get under ``key``. ``rank``: see ``MetricColumn``."""

    key: str
    title: Callable[[Sequence[ResultRow]], str]
    cell: Callable[[ResultRow, ResultRow | None], tuple[str, str]]
    value: Value
    rank: int = 0


def standard_columns() -> list[ShownColumn]:
    """The columns of ``results``, those of rank 0 first to stay."""
    return [of_metrics(column) for column in RESULTS_COLUMNS]


def chosen_columns(names: Sequence[str]) -> list[ShownColumn]:
    """The columns of these names, without the labels, which are there anyway. Raises UsageError."""
    return [find_column(name) for name in names if name.strip().casefold() not in LABELS]


def find_column(name: str) -> ShownColumn:
    """The column that is called ``name``: as in JSON, or by its title, with dashes for spaces. Raises UsageError."""
    wanted = name.strip().casefold()
    for column in RESULTS_COLUMNS:
        for metric in column.metrics:
            if wanted in _names(metric):
                return replace(of_metrics(column), key=metric.key, value=metric.value)
    for metric in ALL_METRICS:
        if wanted in _names(metric):
            return of_metrics(MetricColumn(metrics=(metric,)))
    if wanted in _FIELDS:
        return _of_field(wanted)
    raise UsageError(
        f"{name[:60]!r} is not a column; job, model and scheme are always there, and the columns are "
        f"{', '.join(column_names())}"
    )


def column_names() -> list[str]:
    """The names of all columns, short ones where there are some."""
    return [*(metric.option_name for metric in ALL_METRICS), *_FIELDS]


def _names(metric: Metric) -> tuple[str, ...]:
    return (metric.key, metric.csv_name, metric.option_name)


def of_metrics(column: MetricColumn) -> ShownColumn:
    """``column`` with the ratio of each figure to the baseline's."""
    first = column.metrics[0]
    return ShownColumn(
        key=first.key,
        title=partial(column_title, column),
        cell=lambda row, baseline: (show_column(column, row), show_relative(column, row, baseline)),
        value=first.value,
        rank=column.rank,
    )


# Fields that no metric shows

_FIELDS: dict[str, tuple[Value, Callable[[Any], str]]] = {
    "batch_id": (lambda row: row.batch_id, show_plain),
    "revision": (lambda row: row.revision, show_plain),
    "state": (lambda row: row.state, show_plain),
    "error_kind": (lambda row: row.error_kind, show_plain),
    "reused_from": (lambda row: row.reused_from, show_plain),
    "speed_from": (lambda row: row.speed_from, show_plain),
    "bits": (lambda row: row.bits, show_plain),
    "dtype": (lambda row: row.dtype, show_plain),
    "compute_dtype": (lambda row: row.compute_dtype, show_plain),
    "device_name": (lambda row: row.device_name, show_plain),
    "num_parameters": (lambda row: row.num_parameters, show_count),
    "quantized_fraction": (lambda row: row.quantized_fraction, show_percent),
    "memory_footprint_bytes": (lambda row: row.memory_footprint_bytes, show_bytes),
    "protocol_hash": (lambda row: row.protocol_hash, lambda value: str(value)[:8]),
    "checkpoint_path": (lambda row: row.checkpoint_path, show_plain),
}


def _of_field(name: str) -> ShownColumn:
    value, show = _FIELDS[name]

    def cell(row: ResultRow, _: ResultRow | None) -> tuple[str, str]:
        found = value(row)
        return (NOTHING if found is None else printable(show(found)), "")

    def title(rows: Iterable[ResultRow]) -> str:
        return name.replace("_", " ") if any(value(row) is not None for row in rows) else ""

    return ShownColumn(key=name, title=title, cell=cell, value=value)

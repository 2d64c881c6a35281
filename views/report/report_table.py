"""Tables of a report: a row for each configuration, and columns that can be sorted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.measured.metric import Better, Metric, MetricColumn, Unit
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import NOTHING
from qbatch.views.groups import source_name
from qbatch.views.metric_text import column_title, show_metric
from qbatch.views.ratios import show_relative
from qbatch.views.report.column_unit import ColumnUnit, column_unit
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.scheme import show_scheme

JudgedRow = tuple[JudgedGroup, ResultRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLabel:
    """What a row is of."""

    model: str
    scheme: str
    job_id: str
    setting: str

    @classmethod
    def of(cls, judged: JudgedGroup, row: ResultRow) -> RowLabel:
        return cls(model=judged.model, scheme=show_scheme(row), job_id=row.job_id, setting=judged.setting)

    @classmethod
    def of_job(cls, row: ResultRow) -> RowLabel:
        return cls(model=source_name(row), scheme=show_scheme(row), job_id=row.job_id, setting="")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCell:
    """``error`` and ``relative`` stand after ``text``. ``sort``: what sorts it; None comes last."""

    text: str
    error: str = ""
    relative: str = ""
    sort: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableHeading:
    """``higher_first``: sorting begins with the highest value. ``error_width`` and ``relative_width``: of the longest
    such text in the column, in characters, so that the numbers before them line up; 0 if no cell has one."""

    title: str
    unit: str = ""
    higher_first: bool = False
    error_width: int = 0
    relative_width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    label: RowLabel
    is_baseline: bool
    is_pick: bool
    cells: Sequence[TableCell]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    headings: Sequence[TableHeading]
    rows: Sequence[TableRow]


TableColumn = tuple[TableHeading, Sequence[TableCell]]


def report_table(rows: Sequence[JudgedRow], columns: Iterable[TableColumn]) -> ReportTable:
    """A table of those of ``columns`` that have any figure."""
    shown = [(heading, cells) for heading, cells in columns if any(cell.text != NOTHING for cell in cells)]
    return ReportTable(
        headings=[heading for heading, _ in shown],
        rows=[
            TableRow(
                label=RowLabel.of(judged, row),
                is_baseline=row.is_baseline,
                is_pick=judged.is_pick(row),
                cells=[cells[number] for _, cells in shown],
            )
            for number, (judged, row) in enumerate(rows)
        ],
    )


def metric_table_column(column: MetricColumn, rows: Sequence[JudgedRow]) -> TableColumn:
    """A column of the registry: values, their standard errors where they have any, and their ratios to baselines."""
    metrics = [column.metric_of(row) for _, row in rows]
    known = list(dict.fromkeys(metric for metric in metrics if metric is not None))
    unit = _unit_of(known, [row for _, row in rows])
    cells = [_cell(column, metric, unit, *one) for metric, one in zip(metrics, rows, strict=True)]
    heading = TableHeading(
        title=column_title(column, [row for _, row in rows]),
        unit=unit.label if unit else "",
        higher_first=any(metric.better is Better.HIGHER for metric in known),
        error_width=max((len(cell.error) for cell in cells), default=0),
        relative_width=max((len(cell.relative) for cell in cells), default=0),
    )
    return heading, cells


def _unit_of(metrics: Sequence[Metric], rows: Sequence[ResultRow]) -> ColumnUnit | None:
    """The unit of a column; None if its figures have several units, so that each shows its own."""
    units: set[Unit] = {metric.unit for metric in metrics}
    if len(units) != 1:
        return None
    values = [value for metric in metrics for row in rows if (value := metric.value(row)) is not None]
    return column_unit(units.pop(), values)


def _cell(
    column: MetricColumn, metric: Metric | None, unit: ColumnUnit | None, judged: JudgedGroup, row: ResultRow
) -> TableCell:
    value = None if metric is None else metric.value(row)
    if metric is None or value is None:
        return TableCell(text=NOTHING)
    error = None if metric.error is None else metric.error(row)
    show = unit.show if unit else None
    return TableCell(
        text=show_metric(metric, row) if show is None else show_finite(value, show),
        error="" if error is None or show is None else f"± {show_finite(error, show)}",
        relative=show_relative(column, row, judged.baseline(row)),
        sort=value if math.isfinite(value) else None,
    )


def show_finite(value: float, show: Callable[[float], str]) -> str:
    """A stored figure may be NaN or infinite, which has no unit."""
    if math.isnan(value):
        return "NaN"
    return show(value) if math.isfinite(value) else "∞" if value > 0 else "−∞"

"""A table of figures that drops columns until it fits the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qbatch.core.measured.metrics import RESULTS_COLUMNS
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import GAP, UNLIMITED
from qbatch.views.metric_text import column_title, show_column
from qbatch.views.ratios import show_relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the table: a label and (figure, ratio) for each of RESULTS_COLUMNS, or a remark in their place."""

    row: ResultRow
    label: str
    cells: Sequence[tuple[str, str]] = ()
    remark: str | None = None


def cells_of(row: ResultRow, baseline: ResultRow | None) -> list[tuple[str, str]]:
    return [(show_column(column, row), show_relative(column, row, baseline)) for column in RESULTS_COLUMNS]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One of RESULTS_COLUMNS, by its index. Widths are in characters; the ratio's includes the space before it."""

    number: int
    title: str
    figure_width: int
    ratio_width: int

    @classmethod
    def of(cls, number: int, title: str, cells: Sequence[tuple[str, str]]) -> _Column:
        ratio = max(len(ratio) for _, ratio in cells)
        ratio += bool(ratio)
        figure = max(len(title) - ratio, *(len(figure) for figure, _ in cells))
        return cls(number=number, title=title, figure_width=figure, ratio_width=ratio)

    def show(self, line: Line) -> str:
        figure, ratio = line.cells[self.number]
        space = " " if self.ratio_width else ""
        return figure.rjust(self.figure_width) + (space + ratio).ljust(self.ratio_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureTable:
    """Columns that the lines of all models share."""

    label_width: int
    columns: Sequence[_Column]

    @classmethod
    def of(cls, lines: Sequence[Line]) -> FigureTable:
        """A table with a column for each figure that any line has."""
        measured = [line for line in lines if line.cells]
        rows = [line.row for line in measured]
        titles = [column_title(column, rows) for column in RESULTS_COLUMNS]
        columns = [
            _Column.of(number, title, [line.cells[number] for line in measured])
            for number, title in enumerate(titles)
            if title
        ]
        return cls(label_width=max(len(line.label) for line in lines), columns=columns)

    def fitted(self, width: int) -> FigureTable:
        """The same without the columns that do not fit ``width``, least important first. One always stays."""
        columns = list(self.columns)
        while len(columns) > 1 and len(replace(self, columns=columns).header()) > width:
            columns.remove(max(columns, key=lambda column: RESULTS_COLUMNS[column.number].rank))
        return replace(self, columns=columns)

    def titles_left_out(self, fitted: FigureTable) -> list[str]:
        return [column.title for column in self.columns if column not in fitted.columns]

    def header(self) -> str:
        titles = [column.title.rjust(column.figure_width + column.ratio_width) for column in self.columns]
        return GAP.join([" " * self.label_width, *titles])

    def show(self, line: Line, width: int) -> list[str]:
        label = line.label.ljust(self.label_width)
        if line.remark is not None:
            return wrap(line.remark, width, first=label + GAP, indent=GAP * 3)
        return [GAP.join([label, *(column.show(line) for column in self.columns)]).rstrip()]


def wrap(text: str, width: int, *, first: str = "", indent: str = "") -> list[str]:
    if width >= UNLIMITED:
        return [first + text]
    # A label that fills the line leaves the text a line of its own.
    return textwrap.wrap(text, max(width, 40), initial_indent=first, subsequent_indent=indent) or [first]

"""A table of figures that drops columns until it fits the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import GAP, text_width
from qbatch.views.result_columns import ShownColumn
from qbatch.views.wrapped_text import wrap

_LEAST_OF_A_LABEL = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the table: a label and the row's figures beside those of ``baseline``, or a remark in their place."""

    row: ResultRow
    label: str
    baseline: ResultRow | None = None
    remark: str | None = None
    # Judging what is noise takes most of the time of a long table, and each cell is asked for several times.
    _cells: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def cell(self, column: ShownColumn) -> tuple[str, str]:
        if column.key not in self._cells:
            self._cells[column.key] = column.cell(self.row, self.baseline)
        return self._cells[column.key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    """A column with its widths in characters; the ratio's includes the space before it."""

    column: ShownColumn
    title: str
    figure_width: int
    ratio_width: int

    @classmethod
    def of(cls, column: ShownColumn, title: str, lines: Sequence[Line]) -> _Sized:
        cells = [line.cell(column) for line in lines]
        ratio = max(len(ratio) for _, ratio in cells)
        ratio += bool(ratio)
        figure = max(len(title) - ratio, *(text_width(figure) for figure, _ in cells))
        return cls(column=column, title=title, figure_width=figure, ratio_width=ratio)

    @property
    def width(self) -> int:
        return self.figure_width + self.ratio_width

    def show(self, line: Line) -> str:
        figure, ratio = line.cell(self.column)
        space = " " if self.ratio_width else ""
        return figure.rjust(self.figure_width) + (space + ratio).ljust(self.ratio_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureTable:
    """Columns that all lines share. A label that is wider than ``label_width`` has a line of its own."""

    label_width: int
    columns: Sequence[_Sized]

    @classmethod
    def of(cls, lines: Sequence[Line], columns: Sequence[ShownColumn]) -> FigureTable:
        """A table with those of ``columns`` of which any line has a figure."""
        measured = [line for line in lines if line.remark is None]
        rows = [line.row for line in measured]
        titled = [(column, title) for column in columns if (title := column.title(rows))]
        return cls(
            label_width=max((text_width(line.label) for line in lines), default=0),
            columns=[_Sized.of(column, title, measured) for column, title in titled],
        )

    @property
    def shown(self) -> list[ShownColumn]:
        return [sized.column for sized in self.columns]

    @property
    def figures_width(self) -> int:
        """What the columns take, with the gap before each."""
        return sum(len(GAP) + sized.width for sized in self.columns)

    def fitted(self, width: int) -> FigureTable:
        """The table without the columns that do not fit ``width``; the least important are left out first. Columns of
        rank 0 stay. If they do not fit beside the labels, the longest labels get lines of their own."""
        columns = list(self.columns)
        while self.label_width + sum(len(GAP) + sized.width for sized in columns) > width:
            last = max(columns, key=lambda sized: sized.column.rank, default=None)
            if last is None or last.column.rank == 0:
                break
            columns.remove(last)
        table = replace(self, columns=columns)
        room = width - table.figures_width
        # Where not even a job's id fits, the terminal breaks the lines, which is better than labels without figures.
        return table if room < _LEAST_OF_A_LABEL else replace(table, label_width=min(self.label_width, room))

    def titles_left_out(self, fitted: FigureTable) -> list[str]:
        return [sized.title for sized in self.columns if sized not in fitted.columns]

    def header(self, label: str = "") -> str:
        titles = [sized.title.rjust(sized.width) for sized in self.columns]
        return GAP.join([label.ljust(self.label_width), *titles])

    def show(self, line: Line, width: int) -> list[str]:
        label = line.label + " " * (self.label_width - text_width(line.label))
        if line.remark is not None:
            return wrap(line.remark, width, first=label + GAP, indent=GAP * 3)
        figures = [sized.show(line) for sized in self.columns]
        if text_width(line.label) > self.label_width:
            return [line.label, GAP.join([" " * self.label_width, *figures]).rstrip()]
        return [GAP.join([label, *figures]).rstrip()]

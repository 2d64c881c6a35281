"""The table of results for people: by model, each quantized row's figures beside their ratio to the baseline."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from models_db.domain import JobState
from views.figures import FIGURES, Figure, Row
from views.tables import UNLIMITED, Column, printable, terminal_width
from views.units import show_count

_GAP = "  "
_LEGEND_WIDTH = 100


@dataclass(slots=True)
class Footnotes:
    """Numbered remarks; the same remark has one number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """One row as shown: its label, and (figure, ratio) for each of FIGURES, or a remark in their place."""

    row: Row
    label: str
    cells: Sequence[tuple[str, str]] = ()
    remark: str | None = None


def results_table(rows: Sequence[Row]) -> str:
    """``models_db.results.find_results``'s rows as a table that fits the terminal, with footnotes and a legend.

    Rows are grouped by batch and model in the order given, a group's baseline first. A ratio stands only beside a
    figure that was measured under its baseline's protocol, and for speed and memory on its device.
    """
    return _lay_out(rows, terminal_width())


def result_columns() -> tuple[Column, ...]:
    """The same figures, one to a column, without ratios."""
    figures = ((key, *shown) for figure in FIGURES for key, shown in figure.keys.items())
    return (
        Column(key="job_id", title="job"),
        Column(key="model", title="model", wraps=True),
        Column(key="scheme", title="scheme"),
        Column(key="state", title="state"),
        *(Column(key=key, title=title, show=show, spare=True) for key, title, show in figures),
    )


def _lay_out(rows: Sequence[Row], width: int) -> str:
    if not rows:
        return "no results"
    notes = Footnotes()
    by_id = {row["job_id"]: row for row in rows}
    groups = [(heading, [_line(row, by_id, notes) for row in members]) for heading, members in _groups(rows)]
    lines = [line for _, members in groups for line in members]
    measured = [line.row for line in lines if line.cells]
    whole = _Grid.of(lines, measured)
    grid = whole.fitted(width)
    body = [grid.header()] if measured else []
    for heading, members in groups:
        body += ["", heading, *(text for line in members for text in grid.show(line, width))]
    left_out = [column.title for column in whole.columns if column not in grid.columns]
    return "\n".join([*body, *_footer(measured, notes, left_out, min(width, _LEGEND_WIDTH))]).lstrip("\n")


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    members: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        members.setdefault((row["batch_id"], row["model"], row["revision"]), []).append(row)
    several = len({row["batch_id"] for row in rows}) > 1
    return [
        (_heading(group, several), sorted(group, key=lambda row: bool(row["scheme"] != "none")))
        for group in members.values()
    ]


def _heading(group: Sequence[Row], with_batch: bool) -> str:
    row = group[0]
    parameters = next((r["num_parameters"] for r in group if r["num_parameters"] is not None), None)
    return printable(
        row["model"]
        + (f"@{row['revision']}" if row["revision"] else "")
        + (f" · {show_count(parameters)} parameters" if parameters is not None else "")
        + (f" · {row['batch_id']}" if with_batch else "")
    )


def _line(row: Row, by_id: Mapping[str, Row], notes: Footnotes) -> _Line:
    label = f"{_GAP}{row['job_id']} {_scheme(row)}"
    if row["state"] != JobState.SUCCEEDED:
        return _Line(row=row, label=label, remark=_remark(row))
    baseline = by_id.get(row["baseline_job_id"])
    marks = "".join(notes.mark(text) for text in _remarks(row, baseline))
    cells = [(figure.show(row), _ratio(figure, row, baseline)) for figure in FIGURES]
    return _Line(row=row, label=f"{label} {marks}".rstrip(), cells=cells)


def _scheme(row: Row) -> str:
    if row["scheme"] == "none":
        return f"baseline {row['dtype']}"
    double = " double" if row["double_quant"] else ""
    compute = row["compute_dtype"]
    return f"{row['scheme']}{double}" + ("" if compute in ("auto", row["dtype"]) else f" in {compute}")


def _remark(row: Row) -> str:
    reason = ": ".join(row[key] for key in ("error_kind", "error_message") if row[key])
    return printable(f"{row['state']}: {reason}" if reason else row["state"])


def _remarks(row: Row, baseline: Row | None) -> Iterable[str]:
    if row["reused_from"] is not None:
        yield "taken from an earlier job's measurement of the same checkpoint and protocol; not measured again"
    fraction = row["quantized_fraction"]
    if row["scheme"] != "none" and fraction is not None and fraction < 0.5:
        yield (
            f"only {fraction * 100:.3g} % of its parameters are stored in {row['bits']} bits: "
            f"the rest, which the scheme does not reach, is {row['dtype']}"
        )
    if row["baseline_job_id"] is None:
        return
    if baseline is None:
        yield "no ratio: its baseline is not among the rows shown"
    elif baseline["state"] != JobState.SUCCEEDED:
        yield "no ratio: its baseline has no result"
    elif row["protocol_hash"] != baseline["protocol_hash"]:
        yield "no ratio: measured under another protocol than its baseline, so that the numbers say different things"
    elif row["device_name"] != baseline["device_name"]:
        yield f"no ratio of speed or memory: measured on {row['device_name']}, its baseline on another device"


def _ratio(figure: Figure, row: Row, baseline: Row | None) -> str:
    key = figure.key(row)
    if figure.ratio is None or key is None or baseline is None or not baseline.get(key):
        return ""
    if row["protocol_hash"] != baseline["protocol_hash"]:
        return ""
    if figure.on_device and row["device_name"] != baseline["device_name"]:
        return ""
    return figure.ratio(row[key] / baseline[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class _GridColumn:
    """One of FIGURES, by its index; widths in characters, the ratio's with the space before it."""

    number: int
    title: str
    figure_width: int
    ratio_width: int

    @classmethod
    def of(cls, number: int, title: str, cells: Sequence[tuple[str, str]]) -> _GridColumn:
        ratio = max(len(ratio) for _, ratio in cells)
        ratio += bool(ratio)
        figure = max(len(title) - ratio, *(len(figure) for figure, _ in cells))
        return cls(number=number, title=title, figure_width=figure, ratio_width=ratio)

    def show(self, line: _Line) -> str:
        figure, ratio = line.cells[self.number]
        return figure.rjust(self.figure_width) + ratio.rjust(self.ratio_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Lines of every model under common columns."""

    label_width: int
    columns: Sequence[_GridColumn]

    @classmethod
    def of(cls, lines: Sequence[_Line], measured: Sequence[Row]) -> _Grid:
        """With a column for each figure that any row has."""
        columns = [
            _GridColumn.of(number, title, [line.cells[number] for line in lines if line.cells])
            for number, title in enumerate(figure.title(measured) for figure in FIGURES)
            if title
        ]
        return cls(label_width=max(len(line.label) for line in lines), columns=columns)

    def fitted(self, width: int) -> _Grid:
        """Without the columns that do not fit; the first always stays."""
        columns = list(self.columns)
        while len(columns) > 1 and len(replace(self, columns=columns).header()) > width:
            columns.remove(max(columns, key=lambda column: FIGURES[column.number].rank))
        return replace(self, columns=columns)

    def header(self) -> str:
        titles = [column.title.rjust(column.figure_width + column.ratio_width) for column in self.columns]
        return _GAP.join([" " * self.label_width, *titles])

    def show(self, line: _Line, width: int) -> list[str]:
        label = line.label.ljust(self.label_width)
        if line.remark is not None:
            return _wrap(line.remark, width, first=label + _GAP, indent=_GAP * 3)
        return [_GAP.join([label, *(column.show(line) for column in self.columns)]).rstrip()]


def _footer(measured: Sequence[Row], notes: Footnotes, left_out: Sequence[str], width: int) -> list[str]:
    lines = [""] if measured else []
    for number, text in enumerate(notes.texts, start=1):
        lines += _wrap(printable(text), width, first=f"[{number}] ", indent=_GAP * 2)
    if left_out:
        lines += _wrap(f"Left out for want of width: {', '.join(left_out)}.", width)
    for text in _legend(measured):
        lines += _wrap(text, width)
    return lines


def _legend(measured: Sequence[Row]) -> Iterable[str]:
    if any(row["baseline_job_id"] is not None for row in measured):
        yield (
            "× is a figure divided by its baseline's, the same model unquantized: ×0.5 of a size or a time is half of "
            "it, ×0.5 of a rate is half the speed. Perplexity, where lower is better, shows its change."
        )
    if any(row.get("kl_mean") is not None for row in measured):
        yield (
            "KL is the mean divergence of the model's predictions from its baseline's, in nats; top-1 says how often "
            "the most likely token is the same."
        )
    devices = sorted({printable(row["device_name"]) for row in measured})
    if devices:
        yield f"Speed and memory are those of {' and '.join(devices)}, and of no other device."


def _wrap(text: str, width: int, *, first: str = "", indent: str = "") -> list[str]:
    if width >= UNLIMITED:
        return [first + text]
    # A label that takes up the line leaves the text its own line.
    return textwrap.wrap(text, max(width, 40), initial_indent=first, subsequent_indent=indent) or [first]

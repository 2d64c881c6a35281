"""Render rows (mappings) as a table for people, or as JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from unicodedata import combining, east_asian_width

from qbatch.core.control_characters import escape_controls, escape_controls_of_json

NOTHING = "–"
# Wide enough for anything: the width if standard output is not a terminal.
UNLIMITED = 100_000
_NARROWEST_TEXT = 20
_NARROWEST_NAME, _LEGIBLE_NAME = 10, 30
GAP = "  "
PROSE_WIDTH = 100
"""Sentences are not wider than this, on however wide a terminal."""

Row = Mapping[str, Any]


def show_plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table: ``show`` turns the row's value under ``key`` into text, unless it is None.

    Where the terminal is too narrow: ``wraps``: long text may be broken into lines; ``fit``: makes the texts of the
    whole column fit so many characters instead. ``spare``: the column is left out if no row has a value, or if the
    terminal is too narrow for all columns, the last such column first; those that are ``kept`` leave only when what
    ``fit`` makes shorter cannot be shorter. ``zero_is_none``: 0 is not a value.
    """

    key: str
    title: str
    show: Callable[[Any], str] = show_plain
    wraps: bool = False
    fit: Callable[[Sequence[str], int], Sequence[str]] | None = None
    spare: bool = False
    kept: bool = False
    zero_is_none: bool = False


def render(rows: Sequence[Row], columns: Sequence[Column], format: str) -> str:  # noqa: A002
    """``rows`` as a ``table``, ``json``, ``csv`` or ``quiet``, without a newline at the end.

    A table fits the terminal; if standard output is not a terminal, it is as wide as it needs to be. It has no colour.
    JSON and CSV contain every key of the rows, not only ``columns``; CSV holds a nested value as JSON text.
    Quiet is the first column alone, an id in each line.
    Control characters are escaped, so that they cannot control a terminal: as JSON escapes in JSON, as Python's in CSV.
    """
    if format == "quiet":
        return "\n".join(str(row[columns[0].key]) for row in rows)
    if format == "json":
        return _json([_finite(row) for row in rows], indent=2)
    if format == "csv":
        return _csv(rows, columns)
    return _table(rows, columns, terminal_width())


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as GitHub shows it; what a cell holds cannot end it."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, row))} |" for row in rows)


def _markdown_cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def terminal_width() -> int:
    """The terminal's width in columns; UNLIMITED if standard output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def printable(text: str) -> str:
    """``text`` on one line, without control characters: names and messages may come from untrusted sources."""
    return "".join(character if character.isprintable() else " " for character in text)


def _finite(value: Any) -> Any:
    """``value`` with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row)) or [column.key for column in columns]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(keys)
    writer.writerows([_csv_cell(row.get(key)) for key in keys] for row in rows)
    return buffer.getvalue().removesuffix("\n")


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool | Mapping | list | tuple):
        return _json(_finite(value))
    return escape_controls(value, in_lines=True) if isinstance(value, str) else value


def _json(value: Any, indent: int | None = None) -> str:
    return escape_controls_of_json(json.dumps(value, indent=indent, ensure_ascii=False, default=str))


def _table(rows: Sequence[Row], columns: Sequence[Column], width: int) -> str:
    # rich is not used: it takes minutes for a table of 100,000 jobs, because it measures every cell several times.
    shown = [column for column in columns if not (column.spare and rows and _is_empty(rows, column))]
    cells: dict[str, Sequence[str]] = {column.key: [_cell(row, column) for row in rows] for column in shown}
    widths = {column.key: max(map(text_width, (column.title, *cells[column.key]))) for column in shown}
    least = _least(widths, shown, _LEGIBLE_NAME)
    while _total(least, shown) > width and (spare := [c for c in shown if c.spare and not c.kept]):
        shown.remove(spare[-1])
    least = _least(widths, shown, _NARROWEST_NAME)
    while _total(least, shown) > width and (spare := [c for c in shown if c.spare]):
        shown.remove(spare[-1])
    # If the table is still too wide, the terminal breaks its lines, which is better than truncated ids.
    _shrink(widths, least, shown, width)
    for column in shown:
        if column.fit is not None:
            cells[column.key] = column.fit(cells[column.key], widths[column.key])
            widths[column.key] = max(map(text_width, (column.title, *cells[column.key])))
    right = {column.key for column in shown if _is_numeric(rows, column.key)}
    lines = [
        _line([column.title for column in shown], shown, widths, right),
        GAP.join("─" * widths[c.key] for c in shown),
    ]
    lines += [
        line for row in zip(*(cells[c.key] for c in shown), strict=True) for line in _lines(row, shown, widths, right)
    ]
    return "\n".join(lines)


def _least(widths: Mapping[str, int], columns: Sequence[Column], name: int) -> dict[str, int]:
    """How wide each column must be at least, with so much for those that ``fit`` makes shorter."""
    narrow = {c.key: name if c.fit is not None else _NARROWEST_TEXT for c in columns if c.fit is not None or c.wraps}
    return {column.key: min(widths[column.key], narrow.get(column.key, widths[column.key])) for column in columns}


def _total(widths: Mapping[str, int], columns: Sequence[Column]) -> int:
    return sum(widths[column.key] + len(GAP) for column in columns) - len(GAP)


def _shrink(widths: dict[str, int], least: Mapping[str, int], columns: Sequence[Column], width: int) -> None:
    """Narrow the widest text column, repeatedly, until the table fits or no column can become narrower."""
    while (excess := _total(widths, columns) - width) > 0:
        shrinkable = sorted((c.key for c in columns if widths[c.key] > least[c.key]), key=lambda key: -widths[key])
        if not shrinkable:
            return
        second = widths[shrinkable[1]] if len(shrinkable) > 1 else 0
        widest = shrinkable[0]
        widths[widest] -= min(excess, max(1, widths[widest] - max(second, least[widest])))


def _lines(
    cells: Sequence[str], columns: Sequence[Column], widths: Mapping[str, int], right: Container[str]
) -> Iterable[str]:
    """The lines of one row: as many as its longest cell needs."""
    if all(text_width(cell) <= widths[column.key] for cell, column in zip(cells, columns, strict=True)):
        return [_line(cells, columns, widths, right)]
    folded = [
        textwrap.wrap(cell, widths[column.key], break_on_hyphens=False)
        for cell, column in zip(cells, columns, strict=True)
    ]
    return [_line(parts, columns, widths, right) for parts in zip_longest(*folded, fillvalue="")]


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Mapping[str, int], right: Container[str]) -> str:
    padded = []
    for cell, column in zip(cells, columns, strict=True):
        space = " " * (widths[column.key] - text_width(cell))
        padded.append(space + cell if column.key in right else cell + space)
    return GAP.join(padded).rstrip()


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    return NOTHING if value is None else printable(column.show(value))


def text_width(text: str) -> int:
    """The terminal columns that ``text`` takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _is_empty(rows: Sequence[Row], column: Column) -> bool:
    values = (row.get(column.key) for row in rows)
    return all(value is None or (column.zero_is_none and value == 0) for value in values)


def _is_numeric(rows: Sequence[Row], key: str) -> bool:
    values = [row.get(key) for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

"""What loaders make of checkpoints, as text and as rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from qbatch.core.measured.loader_judgement import LoaderJudgement
from qbatch.views.figure_table import wrap
from qbatch.views.formats import Row, printable, terminal_width


def judgement_row(
    folder: Path, loader: str, judged: LoaderJudgement, tried: LoaderJudgement | None = None
) -> dict[str, Any]:
    """What was tried is told instead of what was judged, which is kept in ``judged``."""
    told = tried or judged
    row = {"checkpoint": str(folder), "loader": loader, **told.to_json(), "tried": tried is not None}
    return row | {"judged": judged.to_json()} if tried is not None else row


def judgement_text(rows: Sequence[Row]) -> str:
    """Each checkpoint, and under it each loader with its verdict, reasons and advice."""
    lines: list[str] = []
    for checkpoint, own in groupby(rows, key=lambda row: row["checkpoint"]):
        lines += [printable(checkpoint), *(line for row in own for line in _lines(row)), ""]
    return "\n".join(lines).rstrip()


def _lines(row: Row) -> Iterable[str]:
    yield f"  {row['loader']}: {row['verdict']} ({row['version']}, {row['read_on']})"
    texts = [*row["reasons"], *(f"→ {advice}" for advice in row["advice"])]
    for text in texts:
        yield from wrap(printable(text), terminal_width(), first="    ", indent="    ")

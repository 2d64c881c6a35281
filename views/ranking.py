"""The labels of a flat, ranked table: place, job, model and scheme, in as few columns as there are."""

from __future__ import annotations

from collections.abc import Sequence

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import printable, text_width
from qbatch.views.scheme import brief_schemes

_CUT = "…"
_LEAST_OF_A_NAME = 16


def ranked_labels(rows: Sequence[ResultRow], marks: Sequence[str], width: int) -> list[str]:
    """A label for each of ``rows``, in their order, of at most ``width`` columns where that leaves something of the
    models' names. ``marks``: what stands before each place, one character."""
    places = [str(place) for place in range(1, len(rows) + 1)]
    jobs, schemes = [row.job_id for row in rows], brief_schemes(rows)
    names = short_names([printable(row.model + (f"@{row.revision}" if row.revision else "")) for row in rows])
    widths = [max(map(text_width, texts)) for texts in (places, jobs, schemes)]
    room = width - len(marks[0]) - sum(widths) - 4
    names = [shortened(name, max(room, _LEAST_OF_A_NAME)) for name in names]
    name_width = max(map(text_width, names))
    return [
        f"{mark} {place.rjust(widths[0])} {job.ljust(widths[1])} {_padded(name, name_width)} {scheme}"
        for mark, place, job, name, scheme in zip(marks, places, jobs, names, schemes, strict=True)
    ]


def short_names(whole: Sequence[str]) -> list[str]:
    """Models' names without the owner or the folder, where that tells them apart."""
    last = {name: name.rstrip("/").rpartition("/")[2] or name for name in whole}
    is_clear = len(set(last.values())) == len(last)
    return [last[name] if is_clear else name for name in whole]


def shortened(text: str, width: int) -> str:
    """``text`` with its middle left out, if it is wider than ``width``: the end of a name tells most."""
    if text_width(text) <= width:
        return text
    begin = (width - 1) // 2
    return text[:begin] + _CUT + text[-(width - 1 - begin) :]


def _padded(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))

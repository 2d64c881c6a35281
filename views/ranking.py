"""The labels of a flat, ranked table: place, job, model and scheme, in as few columns as there are."""

from __future__ import annotations

from collections.abc import Sequence

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import printable, text_width
from qbatch.views.scheme import brief_schemes
from qbatch.views.shortened import LEAST_OF_A_NAME, pad, short_names, shorten


def ranked_labels(rows: Sequence[ResultRow], marks: Sequence[str], width: int) -> list[str]:
    """A label for each of ``rows``, in their order, of at most ``width`` columns where that leaves something of the
    models' names. ``marks``: what stands before each place, one character."""
    places = [str(place) for place in range(1, len(rows) + 1)]
    jobs, schemes = [row.job_id for row in rows], brief_schemes(rows)
    names = short_names([printable(row.model + (f"@{row.revision}" if row.revision else "")) for row in rows])
    widths = [max(map(text_width, texts)) for texts in (places, jobs, schemes)]
    room = width - len(marks[0]) - sum(widths) - 4
    names = [shorten(name, max(room, LEAST_OF_A_NAME)) for name in names]
    name_width = max(map(text_width, names))
    return [
        f"{mark} {place.rjust(widths[0])} {job.ljust(widths[1])} {pad(name, name_width)} {scheme}"
        for mark, place, job, name, scheme in zip(marks, places, jobs, names, schemes, strict=True)
    ]

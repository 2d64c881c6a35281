"""Say which parts of a measurement are missing, and why: that is no failure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import first_names

# Without these, columns of a table stay empty. Of the others, `show` tells.
_OF_COLUMNS = (MeasuredPart.QUALITY, MeasuredPart.SPEED)


def missing_part_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield ``Quality was not measured: it was not asked for (--measure quality).`` for each reason."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for row in rows:
        reasons = {part.value: row.not_measured[part] for part in _OF_COLUMNS if part in row.not_measured}
        for reason in dict.fromkeys(reasons.values()):
            parts = tuple(part for part, other in reasons.items() if other == reason)
            found.setdefault((parts, reason), []).append(row.job_id)
    for (parts, reason), jobs in found.items():
        of = "" if len(jobs) == len(rows) else f" of {first_names(jobs)}"
        subject = " and ".join(parts).capitalize()
        yield f"{subject}{of} {'was' if len(parts) == 1 else 'were'} not measured: {reason}."

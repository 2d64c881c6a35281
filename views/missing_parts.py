"""Say which parts of a measurement are missing, and why: that is no failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.metrics import KL_MEAN, PERPLEXITY, RANK_CORRELATION
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import first_names

# Without these, columns of a table stay empty. Of the others, `show` tells.
_OF_COLUMNS = (MeasuredPart.QUALITY, MeasuredPart.SPEED)
_COMPARISON = "comparison with the baseline"
_TASKS = "tasks"


def missing_part_remarks(rows: Sequence[ResultRow]) -> Iterable[str]:
    """Yield ``Quality was not measured: it was not asked for (--measure quality).`` for each reason."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for row in rows:
        reasons = _missing(row)
        for reason in dict.fromkeys(reasons.values()):
            parts = tuple(part for part, other in reasons.items() if other == reason)
            found.setdefault((parts, reason), []).append(row.job_id)
    for (parts, reason), jobs in found.items():
        of = "" if len(jobs) == len(rows) else f" of {first_names(jobs)}"
        subject = " and ".join(parts).capitalize()
        yield f"{subject}{of} {'were' if len(parts) > 1 or _TASKS in parts else 'was'} not measured: {reason}."


def why_no_quality(row: ResultRow) -> str | None:
    """Why nothing is known of the quality of a measured row; None if something is, or no reason is stored."""
    return _missing(row).get(MeasuredPart.QUALITY.value)


def _missing(row: ResultRow) -> Mapping[str, str]:
    """Why parts of a row are missing, by their names."""
    reasons = {part.value: row.not_measured[part] for part in _OF_COLUMNS if part in row.not_measured}
    if row.details.tasks_reason is not None:
        reasons[_TASKS] = row.details.tasks_reason
    if KL_MEAN.value(row) is not None or RANK_CORRELATION.value(row) is not None:
        # Of a row whose tasks failed, workers used to say so of its whole quality.
        reasons.pop(MeasuredPart.QUALITY, None)
        return reasons
    if MeasuredPart.QUALITY in reasons:
        return reasons
    if PERPLEXITY.value(row) is not None:
        reason, name = row.details.quality.reason, _COMPARISON
    else:
        # Why there is no perplexity tells more: without a tokenizer there is nothing to compare either.
        reason, name = row.details.perplexity.reason or row.details.quality.reason, MeasuredPart.QUALITY.value
    return reasons if reason is None else {name: reason, **reasons}

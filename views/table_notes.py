"""What must be said about rows of a table beside their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.audit_text import unmarked_warnings
from qbatch.views.formats import printable
from qbatch.views.groups import timed_apart
from qbatch.views.protocol import version_differences
from qbatch.views.shared_failures import hint_at_log

_NOT_MEASURED_AGAIN = "taken from an earlier job's measurement of the same checkpoint and protocol; not measured again"
_OF_ITS_MIXTURE = "a search: its checkpoint and its figures are those of the mixture that was published for it"


@dataclass(slots=True)
class Footnotes:
    """Numbered remarks. Equal remarks share a number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def notes_of_all(rows: Sequence[ResultRow], by_id: Mapping[str, ResultRow]) -> list[str]:
    """The remarks that each of several measured ``rows`` would have, so that none of them needs to be marked."""
    remarks = [list(row_remarks(row, by_id)) for row in rows if row.state == JobState.SUCCEEDED]
    if len(remarks) < 2:
        return []
    return [text for text in dict.fromkeys(remarks[0]) if all(text in others for others in remarks)]


def row_remarks(row: ResultRow, by_id: Mapping[str, ResultRow]) -> Iterable[str]:
    """Yield the remarks about a measured row. ``by_id`` has its baseline if that is known."""
    baseline = by_id.get(row.baseline_job_id or "")
    if row.reused_from is not None:
        yield _NOT_MEASURED_AGAIN if row.mixture.bound is None else _OF_ITS_MIXTURE
    yield from unmarked_warnings(row)
    if row.baseline_job_id is None:
        return
    if baseline is None:
        yield "no ratios: its baseline is not among the rows shown"
    elif baseline.state != JobState.SUCCEEDED:
        yield "no ratios: its baseline has no result"
    elif row.protocol_hash != baseline.protocol_hash:
        yield "no ratios: it was measured with another protocol than its baseline, so the figures cannot be compared"
    elif row.details.fingerprint != baseline.details.fingerprint:
        yield "no ratios: the model's files changed between its baseline's measurement and its own"
    else:
        yield from _other_visit(row, baseline)


def _other_visit(row: ResultRow, baseline: ResultRow) -> Iterable[str]:
    """Yield how the measurements of a row and its baseline differ although their protocol is the same."""
    if row.device_name != baseline.device_name:
        yield f"no ratios of speed and memory: it was measured on {row.device_name}, its baseline on another device"
    elif timed_apart(row, baseline):
        yield "its rounds did not alternate with its baseline's: the host's speed may have changed in between"
    if versions := version_differences([baseline, row]):
        yield f"its baseline was measured with other versions: {', '.join(versions)}"


def shown_states(rows: Iterable[ResultRow]) -> dict[str, str]:
    """The states of those rows that have no result, by job. A failure that jobs of a model share is said in full of the
    first, and of the others that they failed like it."""
    first: dict[tuple[str | None, ...], str] = {}
    states = {}
    for row in rows:
        if row.state == JobState.SUCCEEDED:
            continue
        failure = (row.batch_id, row.model, row.revision, row.error_kind, row.error_message)
        like = first.setdefault(failure, row.job_id) if row.state == JobState.FAILED else row.job_id
        states[row.job_id] = show_state(row) if like == row.job_id else f"{row.state}: {row.error_kind} like {like}"
    return states


def show_state(row: ResultRow) -> str:
    """A row's state and its error, if any: ``failed: cuda_oom: out of memory (see `qbatch logs j7`)``.

    What no worker has begun has no log.
    """
    words = printable(": ".join(filter(None, (row.state, row.error_kind, row.error_message))))
    return words + hint_at_log(row.job_id) if row.state == JobState.FAILED and row.was_begun else words

"""Groups of measured rows that may be compared: of one model, one protocol and one device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.core.domain import OPEN_STATES, JobState, job_number
from qbatch.core.measured.result_row import ResultRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows of one model, protocol and device: baselines first, each configuration once.

    ``baselines``: for each job id, the row that its figures are compared with, if the group has one.
    ``superseded``: for each job id left out, the id of the newer measurement of the same configuration.
    ``search``: the newest job of the model, in whatever state, that asked for layers at 16 bits within a bound.
    """

    rows: Sequence[ResultRow]
    baselines: Mapping[str, ResultRow]
    superseded: Mapping[str, str]
    search: ResultRow | None = None

    @property
    def device_name(self) -> str:
        return str(self.rows[0].device_name)

    @property
    def awaits_search(self) -> bool:
        return self.search is not None and self.search.state in OPEN_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRows:
    """One model: its groups, and the rows without a result."""

    name: str
    groups: Sequence[Group]
    unmeasured: Sequence[ResultRow]


def models_of(rows: Sequence[ResultRow]) -> list[ModelRows]:
    """Group the rows of ``find_results`` by model, in the order given."""
    by_name: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_name.setdefault(source_name(row), []).append(row)
    return [_model(name, members) for name, members in by_name.items()]


def source_name(row: ResultRow) -> str:
    """``org/model@revision``"""
    return row.model + (f"@{row.revision}" if row.revision else "")


def _model(name: str, rows: Sequence[ResultRow]) -> ModelRows:
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if row.state == JobState.SUCCEEDED:
            # If a folder's content has changed, it is another model under the same name.
            source = row.details.fingerprint
            groups.setdefault((row.protocol_hash, row.device_name, source), []).append(row)
    return ModelRows(
        name=name,
        groups=[_group(members, _newest_search(rows)) for members in groups.values()],
        unmeasured=[row for row in rows if row.state != JobState.SUCCEEDED],
    )


def _newest_search(rows: Sequence[ResultRow]) -> ResultRow | None:
    return max((row for row in rows if row.mixture.bound), key=lambda row: job_number(row.job_id), default=None)


def _group(rows: Sequence[ResultRow], search: ResultRow | None) -> Group:
    newest: dict[str, ResultRow] = {}
    superseded: dict[str, str] = {}
    # Of rows with one measurement, that which was measured: it is called what it is, not after a search that found it.
    for row in sorted(rows, key=lambda row: (_age(row), row.reused_from is None)):
        before = newest.get(configuration(row))
        newest[configuration(row)] = row
        if before is not None and measuring_job(before) != measuring_job(row):
            superseded = {old: row.job_id if new == before.job_id else new for old, new in superseded.items()}
            superseded[before.job_id] = row.job_id
    kept = sorted(newest.values(), key=lambda row: (not row.is_baseline, -row.bits, job_number(row.job_id)))
    baselines = {row.job_id: base for row in kept if (base := _baseline(row, kept)) is not None}
    return Group(rows=kept, baselines=baselines, superseded=superseded, search=search)


def measuring_job(row: ResultRow) -> str:
    """The job that measured a row's figures."""
    return str(row.reused_from or row.job_id)


def timed_job(row: ResultRow) -> str:
    """The job whose rounds a row's speed is of."""
    return row.speed_from or measuring_job(row)


def timed_apart(row: ResultRow, baseline: ResultRow) -> bool:
    """Whether the two are known not to have been timed in turns, so that the host's speed may have differed."""
    if not (_is_timed(row) and _is_timed(baseline)):
        return False
    pairs = ((row, baseline), (baseline, row))
    # One that ended with an error is named by those that were timed beside it, and is timed again by itself.
    named = [(one.details.rounds.interleaved_with, timed_job(other)) for one, other in pairs]
    return any(others is not None and job not in others for others, job in named)


def _is_timed(row: ResultRow) -> bool:
    # The first rows of 0.1.0 have a speed, but not its rounds.
    return bool(row.details.rounds.count) or (row.decode_tokens_per_s, row.forward_samples_per_s) != (None, None)


def _age(row: ResultRow) -> int:
    return job_number(measuring_job(row))


def configuration(row: ResultRow) -> str:
    """A key of what would be shipped: scheme, dtypes and options, regardless of how it was measured."""
    return json.dumps([row.scheme, row.dtype, row.compute_dtype, row.options], sort_keys=True)


def _baseline(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow | None:
    """The unquantized row of the same dtype. It may be of another batch: protocol, device and source are the same."""
    if row.is_baseline:
        return None
    return next((other for other in rows if other.is_baseline and other.dtype == row.dtype), None)

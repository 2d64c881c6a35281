"""The rows of two batches that are of one configuration, paired."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qbatch.core.domain import JobState, job_number
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.figure_changes import Change, FigureChange, figure_changes
from qbatch.views.groups import configuration, measuring_job
from qbatch.views.protocol import differences


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPair:
    """One configuration in both batches. ``changes`` are its figures; none if there is a reason ``why_not``, or if both
    rows have one measurement."""

    before: ResultRow
    after: ResultRow
    changes: Sequence[FigureChange] = ()
    why_not: str | None = None

    @property
    def is_one_measurement(self) -> bool:
        return self.why_not is None and measuring_job(self.before) == measuring_job(self.after)

    @property
    def kinds(self) -> set[Change]:
        return {change.change for change in self.changes}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBatches:
    """``only_before`` and ``only_after``: the rows whose configuration the other batch does not have."""

    pairs: Sequence[RowPair]
    only_before: Sequence[ResultRow]
    only_after: Sequence[ResultRow]


Key = tuple[object, ...]


def pair_batches(before: Sequence[ResultRow], after: Sequence[ResultRow]) -> PairedBatches:
    """Pair the rows of two batches: first those of one protocol and device, then what is left of each configuration."""
    pairs: list[RowPair] = []
    left, right = list(before), list(after)
    for key_of in (_exact_key, _key, _requested_key):
        waiting: dict[Key, list[ResultRow]] = {}
        for row in right:
            waiting.setdefault(key_of(row), []).append(row)
        unpaired = []
        for row in left:
            found = waiting.get(key_of(row))
            if found:
                pairs.append(_pair(row, found.pop(0)))
            else:
                unpaired.append(row)
        paired = {pair.after.job_id for pair in pairs}
        left, right = unpaired, [row for row in right if row.job_id not in paired]
    return PairedBatches(pairs=sorted(pairs, key=_place), only_before=left, only_after=right)


def _key(row: ResultRow) -> Key:
    return (row.model, row.revision, configuration(row))


def _requested_key(row: ResultRow) -> Key:
    """Without what is resolved only where a job was measured: the dtypes, and the layers that a search chose."""
    options = dict(row.options)
    if row.mixture.bound is not None:
        options["skip_modules"] = [row.mixture.title, row.mixture.bound]
    return (row.model, row.revision, row.scheme, json.dumps(options, sort_keys=True))


def _exact_key(row: ResultRow) -> Key:
    return (*_key(row), row.protocol_hash, row.device_name)


def _place(pair: RowPair) -> int:
    return job_number(pair.before.job_id)


def _pair(before: ResultRow, after: ResultRow) -> RowPair:
    why_not = "; ".join(_why_not(before, after)) or None
    is_one = measuring_job(before) == measuring_job(after)
    changes = figure_changes(before, after) if why_not is None and not is_one else ()
    return RowPair(before=before, after=after, changes=changes, why_not=why_not)


def _why_not(before: ResultRow, after: ResultRow) -> Iterable[str]:
    for which, row in (("first", before), ("second", after)):
        if row.state != JobState.SUCCEEDED:
            yield f"{row.state} in the {which}" + (f" ({row.error_kind})" if row.error_kind else "")
    if before.state != JobState.SUCCEEDED or after.state != JobState.SUCCEEDED:
        return
    if before.details.fingerprint != after.details.fingerprint:
        yield "the model's files changed in between"
    elif not _is_one_protocol(before, after):
        yield f"measured in different ways: {', '.join(differences([before, after]))}"


def _is_one_protocol(before: ResultRow, after: ResultRow) -> bool:
    """Whether what both measured was measured alike on one kind of device. What only one of them measured changes
    nothing in the rest, but a profile or the energy beside the times of only one may."""
    parts, others = before.protocol.parts, after.protocol.parts
    if MeasuredPart.SPEED in parts & others and (parts ^ others) & {MeasuredPart.WHY, MeasuredPart.ENERGY}:
        return False
    return before.device_name == after.device_name and _way(before) == _way(after)


# That a row may have the speed of another one changes nothing in how that was timed, and ``speed_from`` says if it has.
_NO_PART_OF_THE_WAY = {*MeasuredPart, "share_speed"}


def _way(row: ResultRow) -> dict[str, object]:
    """How a row's figures were measured, whichever they are."""
    return {name: value for name, value in row.protocol.stored.items() if name not in _NO_PART_OF_THE_WAY}

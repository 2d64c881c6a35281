"""A group of rows with what is chosen of it: decided once, and shown in every part of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qbatch.core.measured.result_row import ResultRow
from qbatch.views.choices import Choice, choose
from qbatch.views.comparison import Preference
from qbatch.views.groups import Group, ModelRows
from qbatch.views.quality_bounds import QualityBound
from qbatch.views.recommend import quality_bounds_for


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedGroup:
    """``choice``: None if there are only baselines. ``setting``: the device and protocol, as far as they distinguish it
    from other groups of the report; else ""."""

    model: str
    group: Group
    choice: Choice | None
    bounds: Sequence[QualityBound]
    setting: str

    def baseline(self, row: ResultRow) -> ResultRow | None:
        return self.group.baselines.get(row.job_id)

    @property
    def ship(self) -> ResultRow | None:
        return None if self.choice is None else self.choice.ship

    def is_pick(self, row: ResultRow) -> bool:
        return self.ship is not None and self.ship.job_id == row.job_id


def judged_groups(models: Iterable[ModelRows], preference: Preference) -> list[JudgedGroup]:
    named = [(model.name, group) for model in models for group in model.groups]
    protocols = protocol_numbers(group.rows[0] for _, group in named)
    devices = {group.device_name for _, group in named}
    return [
        JudgedGroup(
            model=name,
            group=group,
            choice=choose(name, group, preference),
            bounds=quality_bounds_for(group, preference),
            setting=_setting(group, protocols, devices),
        )
        for name, group in named
    ]


def _setting(group: Group, protocols: Mapping[str, int], devices: set[str]) -> str:
    parts = [group.device_name] if len(devices) > 1 else []
    if len(protocols) > 1:
        parts.append(f"protocol {protocols[str(group.rows[0].protocol_hash)]}")
    return ", ".join(parts)


def protocol_numbers(rows: Iterable[ResultRow]) -> dict[str, int]:
    """A short number for each protocol hash, from 1, in the order given."""
    hashes = dict.fromkeys(str(row.protocol_hash) for row in rows)
    return {protocol_hash: number for number, protocol_hash in enumerate(hashes, start=1)}

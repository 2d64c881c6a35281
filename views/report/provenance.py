"""Where the figures of a report come from: protocols, devices, versions, and the hashes of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qbatch.core.domain import JobState
from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db.job_record import WholeJob
from qbatch.views.formats import NOTHING
from qbatch.views.protocol import show_field, show_protocol
from qbatch.views.report.judged_group import JudgedGroup, protocol_numbers
from qbatch.views.report.report_table import RowLabel
from qbatch.views.units import show_utc


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredProtocol:
    number: int
    hash: str
    shapes: Sequence[str]
    fields: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOrigin:
    """Where the figures of one measured job come from."""

    label: RowLabel
    protocol: int
    source: str
    checkpoint: str
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """``versions``: of each library those that measured, with the devices' own."""

    protocols: Sequence[MeasuredProtocol]
    devices: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    jobs: Sequence[JobOrigin]

    @classmethod
    def of(cls, groups: Sequence[JudgedGroup], jobs: Iterable[WholeJob]) -> Provenance:
        rows = [row for judged in groups for row in judged.group.rows]
        numbers = protocol_numbers(judged.group.rows[0] for judged in groups)
        measured = [job for job in jobs if job.row.state == JobState.SUCCEEDED]
        return cls(
            protocols=[_protocol(number, name, rows) for name, number in numbers.items()],
            devices=_devices(rows),
            versions=_versions(rows),
            jobs=[_origin(job, numbers) for job in measured],
        )


def _protocol(number: int, protocol_hash: str, rows: Iterable[ResultRow]) -> MeasuredProtocol:
    own = [row for row in rows if str(row.protocol_hash) == protocol_hash]
    stored = own[0].protocol.stored
    return MeasuredProtocol(
        number=number,
        hash=protocol_hash,
        shapes=list(dict.fromkeys(map(show_protocol, own))),
        fields=[
            (name, str(value) if name.endswith("sha256") else show_field(name, value)) for name, value in stored.items()
        ],
    )


def _devices(rows: Iterable[ResultRow]) -> list[tuple[str, str]]:
    """Each device's name with its UUIDs."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(str(row.device_name), {}).update(
            {} if row.details.device_uuid is None else {row.details.device_uuid: None}
        )
    return [(name, ", ".join(uuids)) for name, uuids in found.items()]


def _versions(rows: Iterable[ResultRow]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for library, version in (row.details.versions or {}).items():
            if version is not None:
                found.setdefault(library, {})[version] = None
    return [(library, ", ".join(versions)) for library, versions in found.items()]


def _origin(job: WholeJob, numbers: Mapping[str, int]) -> JobOrigin:
    row, record = job.row, job.record
    checkpoint, commit = record.checkpoint, row.details.commit
    return JobOrigin(
        label=RowLabel.of_job(row),
        protocol=numbers[str(row.protocol_hash)],
        source=commit or row.details.fingerprint or NOTHING,
        checkpoint=NOTHING if checkpoint is None else checkpoint.root_sha256,
        measured=NOTHING if record.measured_at is None else show_utc(record.measured_at),
    )

"""Results that answer other jobs: of the same checkpoint, measured by the same protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, case, func, select
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import JobState, Method
from qbatch.core.measured.quality_figures import BASE_OUTPUTS_LOST, BASE_OUTPUTS_MISSING
from qbatch.models_db.checkpoints import gone_among
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import in_chunks
from qbatch.models_db.tables import Checkpoint, Job, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPart:
    """A checkpoint that a result was measured with. ``path`` is relative to the storage. ``versions`` are the states of
    its files when they were last verified; None if that is unknown or longer ago than VERIFIED_FOR_S."""

    key: str
    path: str
    versions: Mapping[str, str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job with a result of its own. ``parts``: none for a baseline; an adapter, and the checkpoint that it belongs
    to; else one. ``lacks_outputs``: whether it was not compared, since there were no outputs of its baseline."""

    job_id: int
    parts: tuple[FinishedPart, ...]
    finished_at: datetime
    lacks_outputs: bool


VERIFIED_FOR_S = 30 * 86_400.0
"""How long a verified checkpoint is trusted while its files' times do not change. After that it is read again before it
answers a job, because a failing disk can corrupt a file without changing its times."""


def find_finished(
    session: Session, wanted: Collection[tuple[str, str]], *, device_names: Collection[str] | None
) -> dict[tuple[str, str], Finished]:
    """The newest job with a result of its own for each (checkpoint key, protocol hash) of ``wanted``, if there is one.

    None whose checkpoint is known to be gone: it is to be made again. None that lacks something for a reason that may
    pass: that is tried again.
    Only results of devices with these names count, because speed differs between devices; None accepts any device.
    """
    keys = sorted({key for key, _ in wanted})
    found: dict[tuple[str, str], Finished] = {}
    for chunk in in_chunks(keys):
        rows = session.execute(_finished(chunk, device_names)).all()
        if lacking := {row.checkpoint_key for row in rows if row.is_incomplete}:  # an older one may be whole
            rows = [row for row in rows if row.checkpoint_key not in lacking]
            rows += session.execute(_finished(sorted(lacking), device_names, only_whole=True)).all()
        known = [(row, parts) for row in rows if (parts := _finished_parts(row)) is not None]
        gone = gone_among(session, {part.path for _, parts in known for part in parts})
        for row, parts in known:
            if not any(part.path in gone for part in parts):
                found[row.checkpoint_key, row.protocol_hash] = Finished(
                    job_id=row.id,
                    parts=parts,
                    finished_at=row.finished_at,
                    lacks_outputs=(row.why_not_compared or "").startswith((BASE_OUTPUTS_MISSING, BASE_OUTPUTS_LOST)),
                )
    return {pair: found[pair] for pair in wanted if pair in found}


def answers_beside(
    baselines: Collection[tuple[str, str]], finished: Mapping[tuple[str, str], Finished]
) -> dict[tuple[str, str], Finished]:
    """Those of ``finished`` that answer jobs of a bundle with these ``baselines``: none that was not compared, if the
    baseline of its protocol is still to be measured, or was measured after it."""
    of_protocol = {protocol_hash: finished.get((key, protocol_hash)) for key, protocol_hash in baselines}

    def is_outdated(protocol_hash: str, one: Finished) -> bool:
        baseline = of_protocol[protocol_hash]
        return baseline is None or baseline.finished_at > one.finished_at

    return {
        (key, protocol_hash): one
        for (key, protocol_hash), one in finished.items()
        if not (one.lacks_outputs and protocol_hash in of_protocol and is_outdated(protocol_hash, one))
    }


def _finished_parts(row: Any) -> tuple[FinishedPart, ...] | None:
    """The checkpoints that a job was measured with; None if the one that its adapter belongs to is not on record."""
    if row.checkpoint_path is None:
        return ()
    own = FinishedPart(key=row.checkpoint_key, path=row.checkpoint_path, versions=row.file_versions)
    if row.base_key is None:
        return (own,)
    if row.base_path is None:
        return None
    versions = row.base_versions if row.base_is_verified else None
    return (FinishedPart(key=row.base_key, path=row.base_path, versions=versions), own)


_BASE = aliased(Checkpoint)
# Only where there may be a reason: to parse the details of many results takes time.
_WHY_NOT_COMPARED = case(
    (and_(Result.kl_mean.is_(None), Job.method != Method.NONE), Result.details["quality"]["reason"].as_string())
)


_IS_INCOMPLETE = Result.details["incomplete"].as_boolean()


def _finished(keys: Sequence[str], device_names: Collection[str] | None, *, only_whole: bool = False) -> Select[Any]:
    """The newest job of each (key, protocol). ``only_whole``: of those whose results lack nothing that may yet be
    measured, for which the details of all of them are read."""
    is_verified = Checkpoint.verified_at > db_now(-VERIFIED_FOR_S)
    newest = (
        select(func.max(Job.id))
        .join(Result, Result.job_id == Job.id)
        .where(Job.checkpoint_key.in_(keys), Job.state == JobState.SUCCEEDED)
        .group_by(Job.checkpoint_key, Result.protocol_hash)
    )
    if only_whole:
        newest = newest.where(_IS_INCOMPLETE.is_not(True))
    if device_names is not None:
        newest = newest.where(Result.device_name.in_(device_names))
    return (
        select(
            *(Job.id, Job.checkpoint_key, Result.protocol_hash, Result.checkpoint_path, Checkpoint.file_versions),
            *(Job.finished_at, _WHY_NOT_COMPARED.label("why_not_compared")),
            _IS_INCOMPLETE.label("is_incomplete"),
            *(Job.base_key, _BASE.path.label("base_path"), _BASE.file_versions.label("base_versions")),
            (_BASE.verified_at > db_now(-VERIFIED_FOR_S)).label("base_is_verified"),
        )
        .join(Result, Result.job_id == Job.id)
        .outerjoin(_BASE, _BASE.key == Job.base_key)
        .outerjoin(
            Checkpoint,
            and_(Checkpoint.key == Job.checkpoint_key, Checkpoint.path == Result.checkpoint_path, is_verified),
        )
        .where(Job.id.in_(newest.scalar_subquery()))
    )


def keep(session: Session, job_ids: Collection[int]) -> set[int]:
    """Lock the existing jobs among ``job_ids`` and their checkpoints against removal until the transaction ends, and
    return the ids of the jobs, without those whose checkpoint is gone.

    Call it before recording that one of them answers another job. Whoever removes a checkpoint locks it for an update
    first, and waits; a worker that records it anew or has verified it does not wait, however long this transaction is.
    """
    kept: set[int] = set()
    for chunk in in_chunks(sorted(job_ids)):
        kept.update(session.scalars(_kept(chunk)))
        for recorded in (_recorded(chunk), _recorded_bases(chunk)):
            kept.difference_update(job_id for job_id, gone_at in session.execute(recorded) if gone_at is not None)
    return kept


def _kept(job_ids: Sequence[int]) -> Select[Any]:
    jobs = select(Job.id).where(Job.id.in_(job_ids)).order_by(Job.id)
    return jobs.with_for_update(read=True, key_share=True, of=Job)


def _recorded(job_ids: Sequence[int]) -> Select[int, datetime | None]:
    """The jobs with a checkpoint on record, and since when it is gone."""
    return (
        select(Job.id, Checkpoint.gone_at)
        .join(Result, Result.job_id == Job.id)
        .join(Checkpoint, and_(Checkpoint.key == Job.checkpoint_key, Checkpoint.path == Result.checkpoint_path))
        .where(Job.id.in_(job_ids))
        .order_by(Checkpoint.path)
        .with_for_update(read=True, key_share=True, of=Checkpoint)
    )


def _recorded_bases(job_ids: Sequence[int]) -> Select[int, datetime | None]:
    """The jobs with an adapter whose checkpoint is on record, and since when that is gone."""
    return (
        select(Job.id, Checkpoint.gone_at)
        .join(Checkpoint, Checkpoint.key == Job.base_key)
        .where(Job.id.in_(job_ids))
        .order_by(Checkpoint.path)
        .with_for_update(read=True, key_share=True, of=Checkpoint)
    )

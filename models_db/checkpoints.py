"""The published checkpoints, by key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import NO_SYNC, insert_into
from qbatch.models_db.tables import Checkpoint, Job


def record(
    session: Session,
    *,
    key: str,
    path: str,
    root_sha256: str,
    disk_bytes: int,
    job_id: int,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Record a checkpoint that was just verified, replacing an earlier record of its key.

    ``versions`` are the states in which its files were verified; None if they are unknown.
    """
    # A subquery, because the job may have been pruned while its outcome was in a spool.
    writer = select(Job.id).where(Job.id == job_id).scalar_subquery()
    known = {"path": path, "root_sha256": root_sha256, "disk_bytes": disk_bytes}
    verified = {"file_versions": dict(versions), "verified_at": db_now()} if versions is not None else {}
    session.execute(
        insert_into(session, Checkpoint)
        .values(key=key, job_id=writer, **known, **verified)
        .on_conflict_do_update(index_elements=[Checkpoint.key], set_=known | verified)
    )


def verified_again(session: Session, path: str, versions: Mapping[str, str]) -> None:
    """Record that the files at ``path`` were read and found unchanged."""
    session.execute(
        update(Checkpoint).where(Checkpoint.path == path).values(file_versions=dict(versions), verified_at=db_now()),
        execution_options=NO_SYNC,
    )


def paths(session: Session, keys: Collection[str]) -> dict[str, str]:
    """The paths of the recorded checkpoints with these keys, by key."""
    rows = session.execute(select(Checkpoint.key, Checkpoint.path).where(Checkpoint.key.in_(keys)))
    return {key: path for key, path in rows}


def all_checkpoints(session: Session) -> Sequence[Checkpoint]:
    return session.scalars(select(Checkpoint).order_by(Checkpoint.path)).all()


def checkpoints_of(session: Session, batch_ids: Sequence[int]) -> Sequence[Checkpoint]:
    """The recorded checkpoints for the jobs of these batches, whatever state the jobs are in, in job order."""
    jobs = select(Job.checkpoint_key, func.min(Job.id).label("first")).where(Job.batch_id.in_(batch_ids))
    wanted = jobs.group_by(Job.checkpoint_key).subquery()
    return session.scalars(
        select(Checkpoint).join(wanted, wanted.c.checkpoint_key == Checkpoint.key).order_by(wanted.c.first)
    ).all()

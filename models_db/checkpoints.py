"""Which checkpoints are published, by key."""

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
    """Remember a checkpoint that was just verified; the newest word on a key stands.

    ``versions`` are the states of its files then; None where they are not known.
    """
    # As it may be that of a job that was pruned meanwhile, where its result was spooled for that long.
    writer = select(Job.id).where(Job.id == job_id).scalar_subquery()
    known = {"path": path, "root_sha256": root_sha256, "disk_bytes": disk_bytes}
    verified = {"file_versions": dict(versions), "verified_at": db_now()} if versions is not None else {}
    session.execute(
        insert_into(session, Checkpoint)
        .values(key=key, job_id=writer, **known, **verified)
        .on_conflict_do_update(index_elements=[Checkpoint.key], set_=known | verified)
    )


def verified_again(session: Session, path: str, versions: Mapping[str, str]) -> None:
    """The files at ``path`` were read, and are what was published."""
    session.execute(
        update(Checkpoint).where(Checkpoint.path == path).values(file_versions=dict(versions), verified_at=db_now()),
        execution_options=NO_SYNC,
    )


def paths(session: Session, keys: Collection[str]) -> dict[str, str]:
    """Where the checkpoints of these keys lie, as far as they are on record."""
    rows = session.execute(select(Checkpoint.key, Checkpoint.path).where(Checkpoint.key.in_(keys)))
    return {key: path for key, path in rows}


def all_checkpoints(session: Session) -> Sequence[Checkpoint]:
    return session.scalars(select(Checkpoint).order_by(Checkpoint.path)).all()


def checkpoints_of(session: Session, batch_ids: Sequence[int]) -> Sequence[Checkpoint]:
    """What the batches' jobs ask for and is published, whatever became of the jobs; in the jobs' order."""
    jobs = select(Job.checkpoint_key, func.min(Job.id).label("first")).where(Job.batch_id.in_(batch_ids))
    wanted = jobs.group_by(Job.checkpoint_key).subquery()
    return session.scalars(
        select(Checkpoint).join(wanted, wanted.c.checkpoint_key == Checkpoint.key).order_by(wanted.c.first)
    ).all()

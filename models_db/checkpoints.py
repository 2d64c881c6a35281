"""The published checkpoints, by key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import and_, delete, func, literal, or_, select, union_all, update
from sqlalchemy.orm import Session

from qbatch.models_db.arrival_filter import ALSO_ARRIVING
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.few_jobs import HAS_BASE
from qbatch.models_db.named_jobs import is_named
from qbatch.models_db.session import NO_SYNC, in_chunks, insert_into
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
    known = {"path": path, "root_sha256": root_sha256, "disk_bytes": disk_bytes, "gone_at": None}
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
    """The paths of the recorded checkpoints with these keys, by key, without those that are gone."""
    rows = session.execute(
        select(Checkpoint.key, Checkpoint.path).where(Checkpoint.key.in_(keys), Checkpoint.gone_at.is_(None))
    )
    return {key: path for key, path in rows}


def all_checkpoints(session: Session) -> Sequence[Checkpoint]:
    """All checkpoints that are on record, including those that are gone."""
    return session.scalars(select(Checkpoint).order_by(Checkpoint.path)).all()


def checkpoints_at(
    session: Session, paths: Collection[str], *, lock: bool = False, skip_locked: bool = False
) -> list[Checkpoint]:
    """The records of the checkpoints at these paths, those that are gone included.

    ``lock``: nobody changes them until the transaction ends. ``skip_locked``: without those that others have locked.
    """
    found: list[Checkpoint] = []
    for chunk in in_chunks(sorted(paths)):
        query = select(Checkpoint).where(Checkpoint.path.in_(chunk)).order_by(Checkpoint.path, Checkpoint.key)
        found += session.scalars(query.with_for_update(skip_locked=skip_locked) if lock else query)
    return found


def gone_among(session: Session, paths: Collection[str]) -> set[str]:
    """Those of these paths of checkpoints of which it is known that they are gone."""
    gone: set[str] = set()
    for chunk in in_chunks(sorted(paths)):
        gone.update(
            session.scalars(select(Checkpoint.path).where(Checkpoint.path.in_(chunk), Checkpoint.gone_at.is_not(None)))
        )
    return gone


def note_presence(session: Session, *, gone: Collection[str], present: Collection[str]) -> None:
    """Record which paths were found to have no folder, and which of those that were gone have one again."""
    for chunk in in_chunks(sorted(gone)):
        missing = and_(Checkpoint.path.in_(chunk), Checkpoint.gone_at.is_(None))
        session.execute(update(Checkpoint).where(missing).values(gone_at=db_now()), execution_options=NO_SYNC)
    for chunk in in_chunks(sorted(present)):
        back = and_(Checkpoint.path.in_(chunk), Checkpoint.gone_at.is_not(None))
        session.execute(update(Checkpoint).where(back).values(gone_at=None), execution_options=NO_SYNC)


def take_out(session: Session, path: str) -> None:
    """Record that qbatch removed the checkpoint at ``path``. Its record goes too unless jobs refer to it."""
    note_presence(session, gone=[path], present=())
    forget_unused(session, [path])


def forget_unused(session: Session, paths: Collection[str]) -> None:
    """Delete the records at ``paths`` of checkpoints that are gone and that no job refers to.

    Only for what qbatch removed: what somebody moved away may come back, and is not to be taken for unknown then.
    """
    # A job of a batch that is still being stored may refer to it too.
    has_job = or_(
        select(Job.id).where(Job.checkpoint_key == Checkpoint.key).exists(),
        select(Job.id).where(Job.base_key == Checkpoint.key, HAS_BASE).exists(),
    )
    for chunk in in_chunks(sorted(paths)):
        unused = select(Checkpoint.key).where(Checkpoint.path.in_(chunk), Checkpoint.gone_at.is_not(None), ~has_job)
        keys = session.scalars(unused, execution_options=ALSO_ARRIVING).all()
        session.execute(delete(Checkpoint).where(Checkpoint.key.in_(keys)), execution_options=NO_SYNC)


def checkpoints_of(session: Session, batch_ids: Sequence[int], job_ids: Sequence[int] = ()) -> Sequence[Checkpoint]:
    """The recorded checkpoints for these jobs and those of these batches, whatever state they are in, in job order.

    Those that are gone are included, and so are the ones to which the jobs' adapters belong, each before its adapters.
    """
    these = is_named(batch_ids, job_ids)
    keys = union_all(
        select(Job.base_key.label("key"), Job.id, literal(0).label("place")).where(these, HAS_BASE),
        select(Job.checkpoint_key.label("key"), Job.id, literal(1).label("place")).where(these),
    ).subquery()
    first = select(keys.c.key, func.min(keys.c.id).label("job_id"), func.min(keys.c.place).label("place"))
    wanted = first.group_by(keys.c.key).subquery()
    return session.scalars(
        select(Checkpoint).join(wanted, wanted.c.key == Checkpoint.key).order_by(wanted.c.job_id, wanted.c.place)
    ).all()

"""Which bundles may be dispatched now, in the order of submission, without reading those that come after.

However many jobs wait, only the entries of an index are walked, from the first until enough bundles are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, literal, not_, or_, select, true, tuple_, update
from sqlalchemy.orm import Session, aliased

from qbatch.core.domain import DeviceKind, JobState, Method
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.few_jobs import IS_QUEUED, IS_WAITING, STILL_WAITS, WAITS_AGAIN
from qbatch.models_db.memory_need import NEED_BYTES, may_run_in, ran_out
from qbatch.models_db.session import NO_SYNC
from qbatch.models_db.tables import Job

_FIRST_PAGE = 8
_LARGEST_PAGE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRange:
    """Which bundles belong in a queue, by the memory they need, in bytes. The default accepts all.

    A bundle needs what its largest job needs, predicted or seen: ``over``, which the next smaller class holds, or
    more, and less than ``under``; None for the largest class there is, which also tries what is predicted to fit
    nowhere. ``largest`` is what that class holds: a job that was seen to need as much stands in no queue.
    """

    over: int | None = None
    under: int | None = None
    largest: int | None = None


ANY_NEED = QueueRange()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyBundle:
    """``least`` and ``most`` are the needs of its smallest and largest ready job, in bytes."""

    bundle: str
    first_id: int
    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyBundles:
    """The bundles for one queue: for devices of ``kind``, and of jobs whose needs are in the range ``needs``."""

    kind: DeviceKind
    needs: QueueRange

    def highest_priority(self, session: Session, *, above: int | None, below: int | None) -> int | None:
        """The highest priority of a waiting job, in that range (both ends excluded)."""
        bounds = [] if above is None else [Job.priority > above]
        bounds += [] if below is None else [Job.priority < below]
        highest = select(func.max(Job.priority)).where(*self._candidates(), *bounds)
        return session.execute(highest).scalar_one()

    def batches(self, session: Session, priority: int) -> list[int]:
        """The batches with waiting jobs of that priority, in ascending order."""
        of_priority = (*self._candidates(), Job.priority == priority)
        found = select(func.min(Job.batch_id).label("batch_id")).where(*of_priority).cte("found", recursive=True)
        following = select(func.min(Job.batch_id)).where(*of_priority, Job.batch_id > found.c.batch_id)
        each = select(following.correlate(found).scalar_subquery()).where(found.c.batch_id.is_not(None))
        found = found.union_all(each)
        return list(session.scalars(select(found.c.batch_id).where(found.c.batch_id.is_not(None))))

    def of_batch(self, session: Session, priority: int, batch_id: int) -> Iterator[ReadyBundle | None]:
        """The ready bundles of a batch, read page by page, and None for a page that has none.

        The caller may dispatch each before it takes the next.
        """
        seen: set[str] = set()
        after, size = 0, _FIRST_PAGE
        while True:
            page = session.execute(self._page(priority, batch_id, after, size)).all()
            names = list(dict.fromkeys(row.bundle for row in page if row.bundle not in seen))
            ready = self._read(session, names)
            if self._split_off(session, ready):
                continue
            yield from ready
            if not ready:
                yield None
            if len(page) < size:
                return
            seen.update(names)
            after, size = page[-1].id, min(4 * size, _LARGEST_PAGE)

    def named(self, session: Session, names: Iterable[str]) -> Iterator[ReadyBundle | None]:
        """Those of these bundles that are ready now and belong in this queue, and None for each other one."""
        for name in names:
            ready = self._read(session, [name])
            if self._split_off(session, ready):
                ready = self._read(session, [name])
            yield ready[0] if ready else None

    def of_each_batch(self, session: Session, priority: int, limit: int) -> dict[int, list[str]]:
        """The names of the first ``limit`` ready bundles of each batch. Reads all waiting jobs of that priority, but
        at once."""
        within = and_(IS_WAITING, _is_ready(self.needs), Job.priority == priority)
        each = self._bundles(within).add_columns(
            Job.batch_id, func.row_number().over(partition_by=Job.batch_id, order_by=func.min(Job.id)).label("place")
        )
        ranked = each.group_by(Job.batch_id).subquery()
        first = select(ranked).where(ranked.c.place <= limit).order_by(ranked.c.first_id)
        found: dict[int, list[str]] = {}
        for row in session.execute(first):
            found.setdefault(row.batch_id, []).append(row.bundle)
        return found

    def _page(self, priority: int, batch_id: int, after: int, size: int) -> Select[int, str]:
        """Jobs of which each may make its bundle belong here: the largest of a bundle does."""
        return (
            select(Job.id, Job.bundle)
            .where(*self._candidates(), Job.priority == priority, Job.batch_id == batch_id, Job.id > after)
            .where(_is_ready(self.needs))
            .order_by(Job.id)
            .limit(size)
        )

    def _candidates(self) -> list[ColumnElement[bool]]:
        """What the index over the waiting jobs tells by itself."""
        return [IS_WAITING, Job.device.in_((self.kind, DeviceKind.AUTO)), *self._belongs(NEED_BYTES)]

    def _belongs(self, need: ColumnElement[int]) -> list[ColumnElement[bool]]:
        at_least = [] if self.needs.over is None else [need >= self.needs.over]
        return at_least if self.needs.under is None else [*at_least, need < self.needs.under]

    def _read(self, session: Session, names: Sequence[str]) -> list[ReadyBundle]:
        """The bundles among ``names`` that belong in this queue, in the order of submission."""
        bundles = self._bundles(are_ready(names, self.needs)).order_by(func.min(Job.id))
        return [ReadyBundle(**row) for row in session.execute(bundles).mappings()] if names else []

    def _bundles(self, which: ColumnElement[bool]) -> Select[str, int, int, int]:
        most = func.max(NEED_BYTES)
        return (
            select(
                Job.bundle,
                func.min(Job.id).label("first_id"),
                func.min(NEED_BYTES).label("least"),
                most.label("most"),
            )
            .where(which, Job.device.in_((self.kind, DeviceKind.AUTO)))
            .group_by(Job.bundle)
            .having(*self._belongs(most))
        )

    def _split_off(self, session: Session, ready: Sequence[ReadyBundle]) -> bool:
        """Move each job that is predicted to fit no GPU into a bundle of its own if other jobs of its bundle fit.

        It is then tried alone, so that the others need not wait for a job that will probably fail and end its runner.
        """
        largest = self.needs.largest
        if self.kind is not DeviceKind.CUDA or largest is None or self.needs.under is not None:
            return False
        mixed = [row.bundle for row in ready if row.least < largest <= row.most]
        if not mixed:
            return False
        misfits = free(session, are_ready(mixed, self.needs), largest <= NEED_BYTES)
        for batch_id, job_id in session.execute(select(Job.batch_id, Job.id).where(Job.id.in_(misfits))).all():
            alone = update(Job).where(Job.id == job_id).values(bundle=own_bundle(batch_id, job_id))
            session.execute(alone, execution_options=NO_SYNC)
        return bool(misfits)


def own_bundle(batch_id: int, job_id: int) -> str:
    """The name of a bundle with only this job."""
    return f"{batch_id}:j{job_id}"


def are_ready(names: Sequence[str], needs: QueueRange) -> ColumnElement[bool]:
    """The jobs of these bundles that may be dispatched."""
    # By ids, and not by an index over all that waits, which has the order that is asked for, but is long.
    named = Job.id.in_(select(_OTHER.id).where(_OTHER.bundle.in_(names)))
    return and_(named, STILL_WAITS, _is_ready(needs))


def is_under_way(job: type[Job]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Whether a job is running, and whether it is dispatched.

    Two conditions, because each has its own index: with an ``OR``, SQLite would read every job. It uses no index for
    ``IS NOT NULL``, hence ``> ""``.
    """
    return job.state == literal(JobState.RUNNING.value), job.dispatch_id > ""


# Made once, because making them takes longer than running them.
_OTHER = aliased(Job)
_WRITES = and_(_OTHER.method != Method.NONE, _OTHER.checkpoint_key.is_not(None))
# Not correlated, so that each is evaluated once for all jobs; few are under way.
_UNDER_WAY = [select(_OTHER.bundle).where(condition) for condition in is_under_way(_OTHER)]
_WRITTEN = [select(_OTHER.checkpoint_key).where(condition, _WRITES) for condition in is_under_way(_OTHER)]


def is_due() -> ColumnElement[bool]:
    """A job whose backoff is over."""
    return or_(Job.not_before.is_(None), Job.not_before <= db_now())


def _finds_its_baseline() -> ColumnElement[bool]:
    """A job whose baseline is not going to be measured again after it, or beside it: it would find nothing to be
    compared with. That is so if an attempt of the baseline was lost. One that waits for a larger GPU, which there may
    never be, is not waited for."""
    is_running, is_sent = is_under_way(Job)
    later = and_(WAITS_AGAIN, not_(is_due()))
    # A job of the same bundle comes along with these.
    now = (
        and_(WAITS_AGAIN, is_due()),
        and_(is_sent, IS_QUEUED, Job.attempt > 0),
        and_(is_running, Job.attempt > 1),
    )
    return or_(
        Job.method == Method.NONE,
        and_(
            _MODEL.not_in(_of_baselines(later, Job.batch_id, Job.location)),
            *(
                or_(
                    _MODEL.not_in(_of_baselines(which, Job.batch_id, Job.location)),
                    Job.bundle.in_(_of_baselines(which, Job.bundle)),
                )
                for which in now
            ),
        ),
    )


def _of_baselines(which: ColumnElement[bool], *columns: Any) -> Select[Any]:
    baselines = select(*columns).where(which, Job.method == Method.NONE, ~ran_out())
    # Not correlated, so that each is evaluated once for all jobs; there are few.
    return baselines.correlate(None)


_MODEL = tuple_(Job.batch_id, Job.location)
_FINDS_ITS_BASELINE = _finds_its_baseline()


def _is_ready(needs: QueueRange) -> ColumnElement[bool]:
    """Whether a waiting job may be dispatched.

    It must be due, and not too large; no part of its bundle may be under way, and no other bundle may be writing its
    checkpoint. The rest of a bundle waits for the part that was sent, because that part writes its checkpoints and may
    include its baseline, and not every checkpoint key is known yet. What is compared with a baseline whose attempt was
    lost waits until that is done, or comes along with it.
    """
    return and_(
        is_due(),
        _FINDS_ITS_BASELINE,
        true() if needs.largest is None else may_run_in(needs.largest),
        *(Job.bundle.not_in(bundles) for bundles in _UNDER_WAY),
        or_(Job.checkpoint_key.is_(None), and_(*(Job.checkpoint_key.not_in(keys) for keys in _WRITTEN))),
    )


def free(session: Session, *conditions: ColumnElement[bool], most: int | None = None) -> Sequence[int]:
    """Lock the rows that match (at most ``most``) and return their ids, skipping those that others have locked.

    It never waits, so it cannot deadlock. Skipped jobs are considered again a second later.
    """
    query = select(Job.id).where(*conditions).order_by(Job.id).limit(most)
    return session.scalars(query.with_for_update(skip_locked=True, of=Job)).all()

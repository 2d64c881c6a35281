"""The database's clock is set, back or forth, by most of an hour.

SQLite's is the kernel's and PostgreSQL's its host's, which no test may set. To the fleet it is the same whether the
clock goes back or what was dated goes forth: so the rows are moved, those that say until when something holds and when
somebody was last heard of.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import InstrumentedAttribute

from qbatch.models_db.tables import Job, Lease, Pause, Worker
from tests.acceptance.conftest import processes_of
from tests.chaos.faults.base import ExposedFleet, Kind
from tests.chaos.processes import kill

# Longer than anything here is waited for: a fleet that waits it out is found out.
_SHIFT = timedelta(minutes=50)
_DATED: tuple[InstrumentedAttribute[Any], ...] = (
    Lease.expires_at,
    Job.lease_expires_at,
    Job.not_before,
    Worker.heartbeat_at,
    Pause.until,
)


def _back_while_all_are_down(fleet: ExposedFleet) -> str | None:
    """A machine that comes up with an older time: whoever led, worked or waited did so in what is now the future."""
    return _while_all_are_down(fleet, _SHIFT)


def _forth_while_all_are_down(fleet: ExposedFleet) -> str | None:
    return _while_all_are_down(fleet, -_SHIFT)


def _while_all_are_down(fleet: ExposedFleet, shift: timedelta) -> str | None:
    count = 0
    # What was being started just then is there only at the next look.
    while processes := processes_of(fleet.settings.home):
        count += len(processes)
        kill(processes)
    return f"{count} processes, {_move(fleet, shift)}" if count else None


def _back(fleet: ExposedFleet) -> str | None:
    """Under a fleet that lives: who lives dates anew what it holds, who dies before that leaves it in the future."""
    return _move(fleet, _SHIFT)


def _move(fleet: ExposedFleet, shift: timedelta) -> str:
    moved = [f"{_move_column(fleet, column, shift)} {column}" for column in _DATED]
    return ", ".join(text for text in moved if not text.startswith("0 "))


def _move_column(fleet: ExposedFleet, column: InstrumentedAttribute[Any], shift: timedelta) -> int:
    """In a transaction of its own and in the order of the keys, as everyone locks rows."""
    table = column.class_
    with fleet.write() as session:
        query = select(table).where(column.is_not(None)).order_by(*table.__table__.primary_key).with_for_update()
        rows = session.scalars(query).all()
        for row in rows:
            setattr(row, column.key, getattr(row, column.key) + shift)
        return len(rows)


KINDS: tuple[Kind, ...] = (
    Kind(name="clock set back, all killed", weight=2, is_kill=True, deal=_back_while_all_are_down),
    Kind(name="clock set forth, all killed", weight=1, is_kill=True, deal=_forth_while_all_are_down),
    Kind(name="clock set back", weight=3, is_kill=False, deal=_back),
)

"""Processes that stand still for longer than a lease, and go on."""

from __future__ import annotations

from tests.chaos.faults.base import ExposedFleet, Kind
from tests.chaos.processes import Role, children_of, kill


def _worker(fleet: ExposedFleet) -> str | None:
    victims = [process for process in fleet.living(Role.WORKER) if process not in fleet.frozen]
    if not victims:
        return None
    victim = fleet.rng.choice(victims)
    return f"pid {victim.pid} for {fleet.freeze([victim]):.1f} s"


def _schedulers_while_workers_die(fleet: ExposedFleet) -> str | None:
    """Nobody ends a lease or sends a message again; when they go on, everything has changed."""
    schedulers = [process for process in fleet.living(Role.SCHEDULER) if process not in fleet.frozen]
    workers = fleet.living(Role.WORKER)
    if not schedulers or not workers:
        return None
    seconds = fleet.freeze(schedulers)
    kill([*workers, *(child for worker in workers for child in children_of(worker))])
    return f"{len(schedulers)} schedulers for {seconds:.1f} s, {len(workers)} workers with all below killed"


KINDS: tuple[Kind, ...] = (
    Kind(name="worker stopped past its lease", weight=4, is_kill=False, deal=_worker),
    Kind(name="schedulers stopped, workers killed", weight=3, is_kill=True, deal=_schedulers_while_workers_die),
)

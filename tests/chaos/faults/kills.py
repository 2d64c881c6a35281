"""SIGKILL, to one process or to several at once."""

from __future__ import annotations

import time

from qbatch.core.domain import Stage
from tests.chaos.faults.base import ExposedFleet, Kind, Running
from tests.chaos.processes import Role, children_of, kill, runner_of

_AIM_S = 3.0
_POLL_S = 0.005


def _runner(fleet: ExposedFleet) -> str | None:
    """A runner, in a stage chosen beforehand if one enters it soon."""
    found = _await_stage(fleet, fleet.rng.choice(list(Stage)))
    if found is None:
        return fleet.kill_one(Role.RUNNER)
    runner = runner_of(found.worker_pid)
    if runner is None:
        return None
    kill([runner])
    return f"pid {runner.pid}, j{found.job_id} {found.stage}"


def _await_stage(fleet: ExposedFleet, stage: Stage) -> Running | None:
    """A running job that is at ``stage`` within a while, else any."""
    deadline = time.monotonic() + _AIM_S
    while True:
        running = fleet.running()
        aimed = [found for found in running if found.stage == stage]
        if aimed:
            return fleet.rng.choice(aimed)
        if time.monotonic() > deadline:
            return fleet.rng.choice(running) if running else None
        time.sleep(_POLL_S)


def _redis_and_workers(fleet: ExposedFleet) -> str | None:
    """Messages that stood in Redis, that were being popped, and those who had them, all at once."""
    workers = fleet.living(Role.WORKER)
    servers = fleet.living(Role.REDIS)
    if not workers or not servers:
        return None
    kill([*servers, *workers, *(child for worker in workers for child in children_of(worker))])
    return f"{len(servers)} Redis and {len(workers)} workers with all below"


KINDS: tuple[Kind, ...] = (
    Kind(name="runner", weight=44, is_kill=True, deal=_runner),
    # Alone: its runner and its forkserver must notice.
    Kind(name="worker", weight=9, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.WORKER)),
    Kind(name="worker and runner", weight=5, is_kill=True, deal=lambda fleet: fleet.kill_family(Role.WORKER)),
    Kind(name="forkserver", weight=6, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.FORKSERVER)),
    Kind(name="launcher", weight=4, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.LAUNCHER)),
    Kind(name="scheduler", weight=10, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.SCHEDULER)),
    Kind(name="redis", weight=6, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.REDIS)),
    Kind(name="redis and workers", weight=3, is_kill=True, deal=_redis_and_workers),
    # The kernel tells its children.
    Kind(name="stack", weight=2, is_kill=True, deal=lambda fleet: fleet.kill_one(Role.STACK)),
    Kind(name="stack and all below", weight=2, is_kill=True, deal=lambda fleet: fleet.kill_family(Role.STACK)),
)

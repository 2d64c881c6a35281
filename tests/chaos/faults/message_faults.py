"""Messages that vanish, and messages that come twice."""

from __future__ import annotations

import redis

from qbatch.core.domain import DeviceKind
from qbatch.scheduler.queues import queue_of
from tests.chaos.faults.base import ExposedFleet, Kind


def _flush(fleet: ExposedFleet) -> str | None:
    with fleet.redis() as client:
        lost = sum(client.llen(key) for key in _lists(client))
        client.flushall()
        return f"{lost} messages"
    return None


def _lose(fleet: ExposedFleet) -> str | None:
    with fleet.redis() as client:
        for key in _lists(client):
            if client.rpop(key) is not None:
                return repr(key)
    return None


def _repeat(fleet: ExposedFleet) -> str | None:
    """A second copy of a message beside the first: two workers get it at once."""
    with fleet.redis() as client:
        for key in _lists(client):
            message = client.lindex(key, -1)
            if message is not None:
                client.rpush(key, message)
                return repr(key)
    return None


def _lists(client: redis.Redis) -> list[str]:
    """The lists in which messages wait for CPU workers, one for each priority."""
    queue = queue_of(DeviceKind.CPU)
    return [key for key in client.keys(f"{queue}*") if client.type(key) == "list"]


KINDS: tuple[Kind, ...] = (
    Kind(name="flushall", weight=4, is_kill=False, deal=_flush),
    Kind(name="message lost", weight=6, is_kill=False, deal=_lose),
    Kind(name="message twice", weight=6, is_kill=False, deal=_repeat),
)

"""The dispatcher's view of Redis: sending messages, and finding out which of them are still there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from kombu.exceptions import OperationalError as KombuOperationalError

from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.models_db.window import Dispatch
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import PRIORITY_STEPS, RUN_BUNDLE, redis_priority

log = logging.getLogger("qbatch.scheduler")

# The names that kombu gives to the lists of a queue, and to the hash of unacknowledged messages.
_PRIORITY_SEPARATOR = "\x06\x16"
_UNACKED = "unacked"


class Broker:
    """A connection to Redis. Every method raises BrokerUnreachable if Redis does not answer."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        self._redis: redis.Redis = redis.Redis.from_url(
            settings.redis_url,
            socket_connect_timeout=5,
            socket_timeout=10,
            decode_responses=True,
            encoding_errors="replace",
        )

    def ping(self) -> None:
        with _reachable():
            self._redis.ping()

    def send(self, dispatches: Iterable[Dispatch]) -> None:
        """Put one message for each bundle on its queue."""
        # Fails at once if Redis does not answer; kombu would try for six seconds.
        self.ping()
        with _reachable(), self._app.producer_pool.acquire(block=True) as producer:
            for dispatch in dispatches:
                self._app.send_task(
                    RUN_BUNDLE,
                    args=[list(dispatch.job_ids)],
                    argsrepr=dispatch.label,
                    task_id=dispatch.dispatch_id,
                    queue=dispatch.queue,
                    priority=redis_priority(dispatch.priority),
                    producer=producer,
                )

    def message_ids(self, queues: Iterable[str]) -> frozenset[str]:
        """The ids of all messages that wait in ``queues`` or were delivered and not yet acknowledged."""
        with _reachable():
            return frozenset(self._read_ids(queues))

    def _read_ids(self, queues: Iterable[str]) -> Iterator[str]:
        for queue in queues:
            for step in PRIORITY_STEPS:
                key = f"{queue}{_PRIORITY_SEPARATOR}{step}" if step else queue
                for message in _as_list(self._redis.lrange(key, 0, -1)):
                    yield from _task_id(message)
        for entry in _as_list(self._redis.hvals(_UNACKED)):
            yield from _task_id(entry, unacknowledged=True)

    def close(self) -> None:
        self._redis.close()
        self._app.close()


def _as_list(reply: Any) -> list[str]:
    return list(reply)


def _task_id(text: str, *, unacknowledged: bool = False) -> Iterator[str]:
    """Yield the id of a queued or unacknowledged message, or nothing if the message is not one of qbatch's."""
    try:
        message = json.loads(text)
        yield str((message[0] if unacknowledged else message)["headers"]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        log.warning("Redis holds a message that qbatch did not send; ignoring it")


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, KombuOperationalError, OSError) as error:
        # The message leaves out the URL, which may contain a password.
        raise BrokerUnreachable(f"Redis does not answer: {type(error).__name__}") from error

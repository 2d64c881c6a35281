"""Redis as the dispatcher sees it: messages in, and which of them still stand there."""

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

# How kombu spells a queue's lists and its notes of what was popped but not acknowledged.
_PRIORITY_SEPARATOR = "\x06\x16"
_UNACKED = "unacked"


class Broker:
    """A connection to Redis. Every method raises BrokerUnreachable where it does not answer."""

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
        # Where nothing answers this says so at once; kombu would try for six seconds.
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

    def standing(self, queues: Iterable[str]) -> frozenset[str]:
        """The ids of all messages that wait in ``queues`` or are popped and not acknowledged."""
        with _reachable():
            return frozenset(self._message_ids(queues))

    def _message_ids(self, queues: Iterable[str]) -> Iterator[str]:
        for queue in queues:
            for step in PRIORITY_STEPS:
                key = f"{queue}{_PRIORITY_SEPARATOR}{step}" if step else queue
                for message in _as_list(self._redis.lrange(key, 0, -1)):
                    yield from _task_id(message)
        for note in _as_list(self._redis.hvals(_UNACKED)):
            yield from _task_id(note, noted=True)

    def close(self) -> None:
        self._redis.close()
        self._app.close()


def _as_list(reply: Any) -> list[str]:
    return list(reply)


def _task_id(text: str, *, noted: bool = False) -> Iterator[str]:
    """The id of a message, or of one noted as popped; none of what somebody else put there."""
    try:
        message = json.loads(text)
        yield str((message[0] if noted else message)["headers"]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        log.warning("a message in Redis is not one of qbatch's; left alone")


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, KombuOperationalError, OSError) as error:
        # The URL may carry a password: the message names none.
        raise BrokerUnreachable(f"Redis does not answer: {type(error).__name__}") from error

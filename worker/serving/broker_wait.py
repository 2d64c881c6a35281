"""Wait for Redis before Celery connects to it. Celery's own message names a socket, but neither the reason nor what to
do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.stack_lock import stack_is_running

log = logging.getLogger("qbatch.worker")

_RETRY_S = 1.0
_REMIND_S = 60.0


def await_broker(settings: Settings, pause: Callable[[float], bool]) -> None:
    """Wait until Redis answers. ``pause`` sleeps for the given seconds and returns whether to stop waiting."""
    broker = Broker(settings)
    say_at = time.monotonic()
    try:
        while (problem := _problem(broker)) is not None:
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + _REMIND_S
                log.warning("%s; waiting for it", why_no_broker(settings) or problem)
            if pause(_RETRY_S):
                return
    finally:
        broker.close()


def why_no_broker(settings: Settings) -> str | None:
    """Why there cannot be a Redis: it is that of a stack which is not running. None otherwise."""
    if not settings.is_embedded or stack_is_running(settings):
        return None
    return (
        f"no stack is running with its home in {settings.home}: start one with `qbatch up`, which starts workers too, "
        "or set QBATCH_BROKER_URL"
    )


def _problem(broker: Broker) -> BrokerUnreachable | None:
    try:
        broker.ping()
    except BrokerUnreachable as error:
        return error
    return None

"""What a worker takes from the broker: ids of jobs of one model, and nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from celery.worker.strategy import default
from kombu.exceptions import ContentDisallowed, DecodeError

from models_db.window import MOST_JOBS

log = logging.getLogger("qbatch.worker")

# A database's ids have 63 bits.
_LARGEST_ID = 2**63 - 1
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Headers with which a message could be held back, dropped, or cut short.
_MUST_BE_UNSET = ("eta", "expires", "group")


def strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Celery's own way with a message, once ``problem_of`` finds nothing wrong with it."""
    handle = default(task, app, consumer, **options)

    def vet(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any) -> Any:
        problem = problem_of(message)
        if problem is None:
            return handle(message, body, ack, reject, callbacks, **more)
        log.error("message %s refused: %s", shown(message.headers.get("id")), problem)
        message.reject_log_error(log, consumer.connection_errors)
        return None

    return vet


def problem_of(message: Any) -> str | None:
    """Why a kombu message may not be acted on; None for one like those that ``Broker.send`` makes."""
    headers = message.headers
    if not isinstance(headers.get("id"), str) or not _UUID.fullmatch(headers["id"]):
        return "its id is no UUID"
    if any(headers.get(name) is not None for name in _MUST_BE_UNSET) or any(headers.get("timelimit") or ()):
        return "it says when to run"
    try:
        payload = message.payload
    except (DecodeError, ContentDisallowed):
        return "its body is not JSON"
    match payload:
        case [[job_ids], {**keywords}, {**embedded}] if not keywords and not any(embedded.values()):
            return problem_of_ids(job_ids)
    return "it holds more than a list of job ids"


def problem_of_ids(job_ids: Any) -> str | None:
    """Why this is no list of job ids; None for one."""
    if not isinstance(job_ids, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in job_ids):
        return "its argument is not a list of job ids"
    if not 1 <= len(job_ids) <= MOST_JOBS or len(set(job_ids)) < len(job_ids):
        return f"it names {len(job_ids)} jobs, or one of them twice"
    if not all(1 <= n <= _LARGEST_ID for n in job_ids):
        return "it names a job that no database has"
    return None


def shown(value: Any) -> str:
    """What a stranger wrote, on one line of bounded length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:99]}…"

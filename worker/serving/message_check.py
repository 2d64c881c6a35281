"""Check messages from the broker: a worker accepts only lists of job ids, and commands that change nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from celery.worker import consumer, control

from qbatch.core.domain import LARGEST_ID
from qbatch.models_db.window import MOST_JOBS
from qbatch.scheduler.queues import RUN_BUNDLE

log = logging.getLogger("qbatch.worker")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Texts that Celery and Flower display.
_TEXTS = frozenset({"lang", "argsrepr", "kwargsrepr", "origin", "root_id", "parent_id"})
_LONGEST_TEXT = 2000
_FLAGS = frozenset({"ignore_result", "redelivered"})
# Headers with which a message could be delayed, dropped, repeated, or displayed as another task.
_UNSET = frozenset(
    {
        *("eta", "expires", "group", "group_index", "retries", "replaced_task_nesting"),
        *("shadow", "stamped_headers", "stamps"),
    }
)
_NAMES = _TEXTS | _FLAGS | _UNSET | {"id", "task", "timelimit"}
# The commands of Flower and ``celery inspect``. Celery's other commands stop a worker, remove its queues or revoke
# tasks, and anyone who can reach the broker can send them.
_QUESTIONS = frozenset(
    {
        *("active", "active_queues", "clock", "conf", "ping", "query_task", "registered", "report", "reserved"),
        *("revoked", "scheduled", "stats"),
        *("enable_events", "heartbeat"),
    }
)


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer behind a check: messages in which ``problem_of`` finds a problem are refused.

    An unreadable message would crash Celery's consumer, return to the queue, and crash the next one.
    """

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        handle: Callable[[Any], Any] = super().create_task_handler(*args, **options)

        def check(message: Any) -> Any:
            problem = problem_of(message)
            if problem is None:
                return handle(message)
            log.error("message %s refused: %s", shorten(message.properties.get("correlation_id")), problem)
            message.reject_log_error(log, self.connection_errors)
            return None

        return check


class Commands(dict[str, Callable[..., Any]]):
    """Celery's remote control commands, reduced to those that change nothing."""

    def __init__(self) -> None:
        super().__init__({name: answer for name, answer in control.Panel.data.items() if name in _QUESTIONS})

    def __missing__(self, name: str) -> Callable[..., Any]:
        log.error("remote control command %s refused", shorten(name))
        return _refuse


def _refuse(*_: Any, **__: Any) -> dict[str, str]:
    return {"error": "refused: use the commands of qbatch instead"}


def problem_of(message: Any) -> str | None:
    """Why a kombu message is refused; None if it is like those that ``Broker.send`` makes."""
    try:
        return _problem_of_headers(message.headers) or _problem_of_body(message.payload)
    except Exception as error:
        # Anything can be wrong: exceptions of the codecs, a header of another type, a list nested too deeply.
        return f"it cannot be read ({type(error).__name__})"


def _problem_of_headers(headers: dict[str, Any]) -> str | None:
    if headers.get("task") != RUN_BUNDLE:
        return "it is for another task"
    if not isinstance(headers.get("id"), str) or not _UUID.fullmatch(headers["id"]):
        return "its id is not a UUID"
    if strange := headers.keys() - _NAMES:
        return f"it has the unknown header {shorten(min(strange))}"
    if headers.get("timelimit") not in (None, [None, None]) or any(headers.get(name) for name in _UNSET):
        return "it has a header that changes when or how it runs"
    texts = [headers[name] for name in _TEXTS & headers.keys() if headers[name] is not None]
    if not all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in texts):
        return "a header that should be a short text is not one"
    if any(headers.get(name) not in (None, False, True) for name in _FLAGS):
        return "a header that should be true or false is neither"
    return None


def _problem_of_body(payload: Any) -> str | None:
    match payload:
        case [[job_ids], {**keywords}, {**embedded}] if not keywords and not any(embedded.values()):
            return problem_of_ids(job_ids)
    return "its content is not just a list of job ids"


def problem_of_ids(job_ids: Any) -> str | None:
    """Why this is not a valid list of job ids; None if it is."""
    if not isinstance(job_ids, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in job_ids):
        return "its argument is not a list of job ids"
    if not 1 <= len(job_ids) <= MOST_JOBS or len(set(job_ids)) < len(job_ids):
        return f"it lists {len(job_ids)} jobs, too many or with duplicates"
    if not all(1 <= n <= LARGEST_ID for n in job_ids):
        return "it lists an impossible job id"
    return None


def shorten(value: Any) -> str:
    """Untrusted input for a log message, in ASCII, on one line of limited length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:99]}…"

"""Sends queued jobs to the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qbatch.core.errors import BrokerUnreachable
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database


def send(database: Database, settings: Settings) -> str | None:
    """Send queued jobs to the workers. If that is not possible, return a sentence that says what will send them."""
    from qbatch.scheduler.local_stack import stack_is_running
    from qbatch.scheduler.submit import send_now

    if settings.is_embedded and not stack_is_running(settings):
        return "stored, but no stack is running here: start one with `qbatch up` to run it"
    try:
        send_now(database, settings)
    except BrokerUnreachable as error:
        return f"stored, but {error}: the scheduler will send it when Redis is back"
    return None

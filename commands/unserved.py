"""Says when nothing is there that would work on what is queued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_BATCHES_NAMED = 3


def why_nothing_runs(settings: Settings, session: Session, batches: Sequence[str]) -> str | None:
    """Why nothing works on these open ``batches``, and the command that changes it; None if something does."""
    from qbatch.models_db.listing import live_workers
    from qbatch.scheduler.stack_lock import stack_is_running
    from qbatch.views.shared_failures import name_jobs

    if not batches:
        return None
    named = name_jobs(batches, _BATCHES_NAMED)
    if settings.is_embedded:
        no_stack = f"no stack is running here, so nothing works on {named}: `qbatch up` starts one"
        return None if stack_is_running(settings) else no_stack
    if live_workers(session, settings.lease_s) == 0:
        return f"no worker is live, so nothing works on {named}: `qbatch worker` starts those of a machine"
    return None

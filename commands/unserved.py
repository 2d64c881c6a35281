"""Says when nothing is there that would work on what is queued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qbatch.core.domain import batch_number, format_batch_id
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def why_nothing_runs(settings: Settings, session: Session, batches: Sequence[str]) -> str | None:
    """Why nothing works on these open ``batches``, and the command that changes it; None if something does."""
    from qbatch.models_db.lacking_devices import lacking_devices
    from qbatch.models_db.leases import LEAD, holder
    from qbatch.models_db.listing import live_workers
    from qbatch.scheduler.stack_lock import stack_is_running
    from qbatch.views.shared_failures import name_jobs
    from qbatch.views.why_waiting import BATCHES_NAMED, NO_SCHEDULER, why_lacking

    if not batches:
        return None
    named = name_jobs(batches, BATCHES_NAMED)
    if settings.is_embedded:
        if not stack_is_running(settings):
            return f"no stack is running here, so nothing works on {named}: `qbatch up` starts one"
    elif live_workers(session, settings.lease_s) == 0:
        return f"no worker is live, so nothing works on {named}: `qbatch worker` starts those of a machine"
    elif holder(session, LEAD) is None:
        return NO_SCHEDULER
    lacking = lacking_devices(session, [batch_number(batch_id) for batch_id in batches], settings.lease_s)
    return why_lacking({format_batch_id(batch_id): kind for batch_id, kind in lacking.items()})

"""Says why queued jobs wait although workers are live."""

from __future__ import annotations

from collections.abc import Mapping

from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.watched import Snapshot
from qbatch.views.shared_failures import name_jobs

NO_SCHEDULER = "no scheduler is active, so nothing more is sent to the workers: `qbatch scheduler` runs one"
BATCHES_NAMED = 3
"""How many of many batches are named."""
_LACK = {
    DeviceKind.CUDA: "a GPU, and no live worker has one: `qbatch worker` starts those of a machine with GPUs",
    DeviceKind.CPU: "a CPU, and every live worker has a GPU: `qbatch worker --cpu` starts one without",
}


def why_lacking(batches: Mapping[str, DeviceKind]) -> str | None:
    """A sentence for each kind of device that these batches need and no live worker has."""
    said = []
    for kind, lack in _LACK.items():
        of_kind = [batch_id for batch_id, needed in batches.items() if needed is kind]
        if of_kind:
            verb = "needs" if len(of_kind) == 1 else "need"
            said.append(f"{name_jobs(of_kind, BATCHES_NAMED)} {verb} {lack}")
    return "; ".join(said) or None


def why_waiting(snapshot: Snapshot) -> str | None:
    """Why what is queued waits although workers are live; None if it only waits for its turn."""
    if snapshot.count(JobState.QUEUED) == 0:
        return None
    lacking = {batch.batch_id: batch.lacks_device for batch in snapshot.batches if batch.lacks_device is not None}
    return why_lacking(lacking) if snapshot.has_scheduler else NO_SCHEDULER

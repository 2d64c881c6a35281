"""The columns of the tables of batches, jobs and workers. The rows come from ``qbatch.models_db.listing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qbatch.core.domain import WorkerState
from qbatch.core.job_progress import JobProgress
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.views.formats import Column
from qbatch.views.units import show_bytes, show_duration, show_time, show_time_left


def show_progress(stored: Mapping[str, Any]) -> str:
    """What is measured, or ``1.50 GiB of 23.46 GiB (1.20 GiB read, 300.0 MiB written), 1.20 GiB/s``, as far as known;
    the total counts both."""
    progress = JobProgress.from_json(stored)
    if progress.step is not None:
        return progress.step
    rate = f", {show_bytes(round(progress.bytes_per_s))}/s" if progress.bytes_per_s else ""
    return _show_moved(progress) + rate


def _show_moved(progress: JobProgress) -> str:
    read, written, total = progress.bytes_read, progress.bytes_written, progress.bytes_total
    if read is None:
        return ""
    parts = [f"{show_bytes(read)} read"] + ([f"{show_bytes(written)} written"] if written else [])
    if not total:
        return ", ".join(parts)
    if not written:
        return f"{show_bytes(read)} of {show_bytes(total)} read"
    return f"{show_bytes(read + written)} of {show_bytes(total)} ({', '.join(parts)})"


_ELAPSED = Column(key="elapsed_s", title="elapsed", show=show_duration, spare=True)
_LEFT = Column(key="left_s", title="left", show=show_time_left, spare=True)


BATCH_COLUMNS: tuple[Column, ...] = (
    Column(key="batch_id", title="batch"),
    Column(key="name", title="name", wraps=True),
    Column(key="jobs", title="jobs"),
    Column(key="queued", title="queued"),
    Column(key="running", title="running"),
    Column(key="succeeded", title="succeeded"),
    Column(key="failed", title="failed"),
    Column(key="cancelled", title="cancelled"),
    _LEFT,
    _ELAPSED,
    Column(key="created_at", title="submitted", show=show_time, spare=True),
    Column(key="priority", title="priority", spare=True),
)

JOB_COLUMNS: tuple[Column, ...] = (
    Column(key="job_id", title="job"),
    Column(key="batch_id", title="batch"),
    Column(key="model", title="model", wraps=True),
    Column(key="revision", title="revision", wraps=True, spare=True),
    Column(key="scheme", title="scheme", show=lambda scheme: "baseline" if scheme == "none" else str(scheme)),
    Column(key="state", title="state"),
    Column(key="stage", title="stage"),
    _LEFT,
    _ELAPSED,
    Column(key="attempt", title="attempt", spare=True),
    Column(key="worker", title="worker", wraps=True, spare=True),
    Column(key="progress", title="progress", show=show_progress, wraps=True, spare=True),
    Column(key="error_kind", title="error"),
    Column(key="error_message", title="message", wraps=True, spare=True),
    Column(key="note", title="note", wraps=True, spare=True),
)

WORKER_COLUMNS: tuple[Column, ...] = (
    Column(key="worker", title="worker"),
    Column(key="device_name", title="device", wraps=True),
    Column(key="memory_bytes", title="memory", show=show_bytes),
    Column(key="used_bytes", title="in use", show=show_bytes, spare=True),
    Column(key="busy_share", title="busy", show=lambda share: f"{share:.0%}", spare=True),
    Column(key="vram_class", title="class", show=lambda size: f"{size} GiB", spare=True),
    Column(key="state", title="state"),
    Column(key="jobs", title="jobs", wraps=True),
    Column(key="device_uuid", title="uuid", spare=True),
    Column(key="heartbeat_at", title="last heartbeat", show=show_time, spare=True),
    Column(key="note", title="note", wraps=True),
)


def show_mixtures(jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For people: a scheme's name says what its job has to do with a search."""
    return [{**job, "scheme": f"{job['scheme']}{MixtureOrigin.from_json(job.get('mixture')).title}"} for job in jobs]


def show_busy(workers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For people: a worker that is ready but has jobs is not ready for others."""
    return [{**worker, "state": "busy"} if _is_busy(worker) else dict(worker) for worker in workers]


def _is_busy(worker: Mapping[str, Any]) -> bool:
    return worker["state"] == WorkerState.READY and bool(worker["jobs"])


def removal_columns(*, done: bool) -> tuple[Column, ...]:
    """The columns of what was removed, or would be."""
    return (
        Column(key="what", title="removed" if done else "to remove"),
        Column(key="number", title="number"),
        Column(key="bytes", title="size", show=show_bytes),
    )


def holding_columns(by: str) -> tuple[Column, ...]:
    """The columns of ``du``, grouped in that way."""
    size = Column(key="bytes", title="size", show=show_bytes)
    if by == "path":
        return (
            Column(key="path", title="path"),
            size,
            Column(key="kind", title="what"),
            Column(key="model", title="model", wraps=True, spare=True),
            Column(key="batches", title="batches", spare=True),
            Column(key="note", title="note", wraps=True, spare=True),
        )
    group = () if by == "kind" else (Column(key=by, title=by, wraps=True),)
    return (Column(key="kind", title="what"), *group, Column(key="number", title="number"), size)


VERIFY_COLUMNS: tuple[Column, ...] = (
    Column(key="checkpoint", title="checkpoint"),
    Column(key="state", title="state"),
)

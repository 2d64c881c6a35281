"""The columns of the tables of batches, jobs and workers. The rows come from ``qbatch.models_db.listing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qbatch.core.byte_units import GIB, MIB
from qbatch.core.domain import JobState, WorkerState
from qbatch.core.job_progress import JobProgress
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.views.formats import GAP, PROSE_WIDTH, UNLIMITED, Column, render, terminal_width
from qbatch.views.shared_failures import shared_failures
from qbatch.views.shortened import fit_names
from qbatch.views.units import show_bytes, show_clock, show_time, show_time_left_briefly
from qbatch.views.wrapped_text import wrap


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


def show_moved(progress: JobProgress) -> str:
    """``4.0/23.5 GiB, 1.2 GiB/s``; empty if nothing is known to have moved."""
    moved, total = progress.bytes_moved, progress.bytes_total
    if moved is None:
        return ""
    unit, size = ("GiB", GIB) if max(moved, total or 0) >= GIB else ("MiB", MIB)
    of_total = f"/{total / size:.1f}" if total else ""
    rate = f", {progress.bytes_per_s / size:.1f} {unit}/s" if progress.bytes_per_s else ""
    return f"{moved / size:.1f}{of_total} {unit}{rate}"


def _show_progress_briefly(stored: Mapping[str, Any]) -> str:
    progress = JobProgress.from_json(stored)
    return progress.step or show_moved(progress)


_ELAPSED = Column(key="elapsed_s", title="elapsed", show=show_clock, spare=True, kept=True)
_LEFT = Column(key="left_s", title="left", show=show_time_left_briefly, spare=True, kept=True)


BATCH_COLUMNS: tuple[Column, ...] = (
    Column(key="batch_id", title="batch"),
    Column(key="name", title="name", fit=fit_names, spare=True, kept=True),
    Column(key="jobs", title="jobs"),
    Column(key="queued", title="queued", spare=True, kept=True, zero_is_none=True),
    Column(key="running", title="running", spare=True, kept=True, zero_is_none=True),
    Column(key="succeeded", title="succeeded"),
    Column(key="failed", title="failed", spare=True, kept=True, zero_is_none=True),
    Column(key="cancelled", title="cancelled", spare=True, kept=True, zero_is_none=True),
    _LEFT,
    _ELAPSED,
    Column(key="created_at", title="submitted", show=show_time, spare=True),
    Column(key="priority", title="priority", spare=True, zero_is_none=True),
)

JOB_COLUMNS: tuple[Column, ...] = (
    Column(key="job_id", title="job"),
    Column(key="batch_id", title="batch", spare=True, kept=True),
    Column(key="model", title="model", fit=fit_names),
    Column(key="scheme", title="scheme", show=lambda scheme: "baseline" if scheme == "none" else str(scheme)),
    Column(key="state", title="state"),
    Column(key="stage", title="stage", spare=True),
    _LEFT,
    _ELAPSED,
    Column(key="revision", title="revision", fit=fit_names, spare=True),
    Column(key="attempt", title="attempt", spare=True),
    Column(key="worker", title="worker", fit=fit_names, spare=True),
    Column(key="progress", title="progress", show=_show_progress_briefly, wraps=True, spare=True),
    Column(key="error_kind", title="error", spare=True),
    Column(key="error_message", title="message", wraps=True, spare=True),
    Column(key="note", title="note", wraps=True, spare=True),
)


def jobs_table(jobs: Sequence[Mapping[str, Any]], *, of_one_batch: bool) -> str:
    """The jobs for people, and below them each failure with the jobs that it ended."""
    table = render([_for_people(job, of_one_batch=of_one_batch) for job in jobs], JOB_COLUMNS, "table")
    failed = [(job["job_id"], _error(job)) for job in jobs if job["state"] == JobState.FAILED]
    logged = {job["job_id"] for job in jobs if job["attempt"]}
    terminal = terminal_width()
    # In a pipe each stands on one line, as the jobs do.
    width = terminal if terminal >= UNLIMITED else min(terminal, PROSE_WIDTH)
    lines = [wrap(str(failure), width, indent=GAP) for failure in shared_failures(failed, logged)]
    return "\n".join([table, *([""] if lines else []), *(text for line in lines for text in line)])


def _for_people(job: Mapping[str, Any], *, of_one_batch: bool) -> dict[str, Any]:
    """The stage of a running job says that it runs, and a scheme's name what its job has to do with a search; why jobs
    failed stands below the table."""
    scheme = f"{job['scheme']}{MixtureOrigin.from_json(job.get('mixture')).title}"
    state = job["stage"] or job["state"]
    shown = {**job, "scheme": scheme, "state": state, "stage": None, "error_kind": None, "error_message": None}
    return shown | {"batch_id": None} if of_one_batch else shown


def _error(job: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (job["error_kind"], job["error_message"]))) or "of an unknown reason"


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

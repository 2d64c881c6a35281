"""All about one job, in sections: what was asked, how it went, what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.methods.registry import describe_row
from qbatch.views.figure_table import GAP, wrap
from qbatch.views.figures import Row, dig
from qbatch.views.formats import Column, printable, render, terminal_width
from qbatch.views.listings import show_progress
from qbatch.views.measured_figures import (
    energy_lines,
    memory_lines,
    quality_lines,
    round_lines,
    size_lines,
    speed_table,
)
from qbatch.views.protocol import show_field, show_protocol
from qbatch.views.quantized_share import audit_lines, defects, other_audits, unfair
from qbatch.views.ratios import may_compare
from qbatch.views.results_table import show_state
from qbatch.views.scheme import is_baseline, show_scheme
from qbatch.views.task_scores import task_lines
from qbatch.views.units import show_seconds, show_time
from qbatch.views.why_words import why

_TEXT_WIDTH = 100
_ATTEMPTS: tuple[Column, ...] = (
    Column(key="attempt", title="attempt"),
    Column(key="outcome", title="outcome"),
    Column(key="worker", title="worker", wraps=True),
    Column(key="claimed_at", title="claimed", show=show_time),
    Column(key="seconds", title="lasted", show=show_seconds),
    Column(key="message", title="message", wraps=True, spare=True),
)

Lines = Iterable[tuple[str, str]]


def show_jobs(jobs: Sequence[tuple[Row, Row | None]]) -> str:
    """``qbatch.models_db.job_record.whole_jobs``'s rows, each with its baseline's, one after the other."""
    return "\n\n\n".join(_show_job(job, baseline) for job, baseline in jobs)


def _show_job(job: Row, baseline: Row | None) -> str:
    if baseline is not None and not may_compare(job, baseline, on_device=True):
        baseline = None
    width = terminal_width()
    heading = f"{job['job_id']} {show_scheme(job)} of {job['model']} ({job['batch_id']}): {show_state(job)}"
    parts = [*wrap(printable(heading), min(width, _TEXT_WIDTH)), *_section("job", _job(job), width), *_attempts(job)]
    parts += _section("source", _source(job), width)
    parts += _section("scheme", _scheme(job), width)
    if job["state"] == JobState.SUCCEEDED:
        parts += _measured(job, baseline, width)
    return "\n".join(parts)


def _section(title: str, lines: Lines, width: int) -> list[str]:
    """A title, and each line's text beside its own title; nothing where there are no lines."""
    found = [(name, printable(text)) for name, text in lines]
    if not found:
        return []
    room = max(len(name) for name, _ in found)
    shown = ["", title]
    before = None
    for name, text in found:
        first = GAP + ("" if name == before else name).ljust(room) + GAP
        shown += wrap(text, width, first=first, indent=" " * len(first)) if text else [first.rstrip()]
        before = name
    return shown


def _table(title: str, table: str) -> list[str]:
    return ["", title, *table.splitlines()]


def _job(job: Row) -> Lines:
    if job["reused_from"] is not None:
        yield "answered by", f"{job['reused_from']}, the same checkpoint and protocol; not measured again"
    if job["state"] == JobState.RUNNING:
        progress = show_progress(job["progress"] or {})
        yield "stage", f"{job['stage']} on {job['worker']}" + (f", {progress}" if progress else "")
    for title, key in (("submitted", "created_at"), ("started", "started_at"), ("finished", "finished_at")):
        if job[key] is not None:
            yield title, show_time(job[key])
    if job["not_before"] is not None and job["state"] == JobState.QUEUED:
        yield "not before", show_time(job["not_before"])
    yield "attempts", f"{job['attempt']}, of which {job['failures']} charged"
    if job["priority"]:
        yield "priority", str(job["priority"])
    if job["time_limit_s"] is not None:
        yield "time limit", show_seconds(job["time_limit_s"])


def _attempts(job: Row) -> list[str]:
    attempts: Sequence[Mapping[str, Any]] = job["attempts"]
    return _table("attempts", render(attempts, _ATTEMPTS, "table")) if attempts else []


def _source(job: Row) -> Lines:
    yield "location", job["location"]
    if job["revision"]:
        yield "revision", job["revision"]
    if commit := dig(job, "details.commit"):
        yield "commit", commit
    if fingerprint := dig(job, "details.fingerprint"):
        yield "fingerprint", fingerprint
    if job["allow_pickle"]:
        yield "pickles", "allowed"


def _scheme(job: Row) -> Lines:
    yield "method", "the model itself, unquantized" if is_baseline(job) else job["scheme"]
    yield "dtype", f"{job['dtype']}, computing in {job['compute_dtype']}"
    for name in _options(job):
        yield name, _plain(job["options"][name])
    if job["checkpoint_key"]:
        yield "checkpoint key", job["checkpoint_key"]
    if job["checkpoint_path"]:
        yield "checkpoint", job["checkpoint_path"]
    if job["checkpoint"] is not None:
        yield "sha256", job["checkpoint"]["root_sha256"]
        if job["checkpoint"]["written_by"] != job["job_id"]:
            yield "written by", job["checkpoint"]["written_by"] or "a job that was pruned"


def _options(job: Row) -> Iterable[str]:
    """The options that mean something to the job's method."""
    yield from (option.name for option in describe_row(job["scheme"]).options)
    if not is_baseline(job):
        yield from ("skip_modules", "max_shard_bytes")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "transformers' default" if value is None else str(value)


def _measured(job: Row, baseline: Row | None, width: int) -> Iterable[str]:
    yield from _section("protocol", _protocol(job), width)
    yield from _section("versions", _versions(job), width)
    yield from _section("size", size_lines(job), width)
    if not is_baseline(job):
        yield from _section("coverage audit", [*audit_lines(job), *(("unfit", text) for text in defects(job))], width)
    table = speed_table(job)
    yield from _table(f"speed on {printable(job['device_name'])}", table) if table else ()
    yield from _section("speed by round", round_lines(job), width)
    yield from _section("times", _times(job), width)
    yield from _section("memory, at most", memory_lines(job), width)
    yield from _section("quality", quality_lines(job), width)
    yield from _section("tasks", task_lines(job), width)
    yield from _section("energy", energy_lines(job), width)
    yield from _section("noticed", _noticed(job), width)
    reasons = why(job, baseline)
    if reasons:
        yield from ["", "why", *wrap(" ".join(reasons), min(width, _TEXT_WIDTH), first=GAP, indent=GAP)]


def _noticed(job: Row) -> Lines:
    yield from (("flag", text) for text in unfair(dig(job, "details.flags")))
    yield from other_audits(job)


def _protocol(job: Row) -> Lines:
    yield "hash", job["protocol_hash"]
    yield "shape", show_protocol(job)
    for name, value in (job["protocol"] or {}).items():
        yield name, str(value) if name.endswith("sha256") else show_field(name, value)


def _versions(job: Row) -> Lines:
    for name, version in (dig(job, "details.versions") or {}).items():
        if version is not None:
            yield name, str(version)
    if uuid := dig(job, "details.device_uuid"):
        yield "device", f"{job['device_name']}, {uuid}"


def _times(job: Row) -> Lines:
    for title, key in (("quantize", "quantize_s"), ("load model", "load_model_s")):
        if job[key] is not None:
            yield title, show_seconds(job[key])

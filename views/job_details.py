"""Everything about one job, in sections: what was requested, how it went, what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.domain import JobState
from qbatch.core.measured.metrics import GRAPH_DECODE, RESULTS_COLUMNS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import describe_row
from qbatch.core.search.finished_search import FinishedSearch
from qbatch.models_db.job_record import JobRecord, WholeJob
from qbatch.views.audit_text import (
    audit_lines,
    audit_warnings,
    cpu_kernel_warning,
    defects,
    fairness_remarks,
    loader_lines,
    other_audits,
    speed_origin,
)
from qbatch.views.emulation import emulation_remarks
from qbatch.views.formats import GAP, NOTHING, PROSE_WIDTH, Column, printable, render, terminal_width, text_width
from qbatch.views.group_errors import group_lines
from qbatch.views.listings import show_progress
from qbatch.views.measured_figures import (
    energy_lines,
    memory_lines,
    quality_lines,
    round_lines,
    size_lines,
    speed_table,
)
from qbatch.views.metric_text import column_title, show_column, show_metric
from qbatch.views.protocol import show_field, show_protocol
from qbatch.views.ratios import may_compare, show_relative
from qbatch.views.scheme import show_bound, show_scheme
from qbatch.views.search_figures import frontier_table, search_lines, sensitivity_lines
from qbatch.views.speed_explanation import explain_speed
from qbatch.views.table_notes import show_state
from qbatch.views.task_scores import task_lines
from qbatch.views.text_figures import text_lines
from qbatch.views.units import show_seconds, show_time
from qbatch.views.wrapped_text import wrap

_ATTEMPTS: tuple[Column, ...] = (
    Column(key="attempt", title="attempt"),
    Column(key="outcome", title="outcome"),
    Column(key="worker", title="worker", wraps=True),
    Column(key="claimed_at", title="claimed", show=show_time),
    Column(key="seconds", title="lasted", show=show_seconds),
    Column(key="message", title="message", wraps=True, spare=True),
)

Lines = Iterable[tuple[str, str]]


def show_jobs(jobs: Sequence[WholeJob], *, in_full: bool = False) -> str:
    """Show jobs one after the other, each compared with its baseline: how they went, and the main figures; ``in_full``:
    everything."""
    show = _show_job if in_full else _show_answer
    text = "\n\n\n".join(map(show, jobs))
    if in_full or not jobs:
        return text
    more = f"`qbatch show --all {_named(jobs)}` shows everything: {_THE_REST}"
    return "\n".join([text, "", *wrap(more, min(terminal_width(), PROSE_WIDTH))])


_THE_REST = "source, options, protocol, versions, sizes, audit, loaders, rounds, percentiles, quality, energy."


def _named(jobs: Sequence[WholeJob]) -> str:
    return jobs[0].row.job_id if len(jobs) == 1 else "JOB"


def _show_answer(job: WholeJob) -> str:
    """How it went, what came out beside the baseline's, and what is to be known about that."""
    row, record, baseline = job.row, job.record, job.baseline
    if baseline is not None and not may_compare(row, baseline, on_device=False):
        baseline = None
    width = terminal_width()
    parts = [*_heading(row, width), *_section("job", _job(row, record), width)]
    parts += _attempts(record) if len(record.attempts) > 1 or row.state == JobState.FAILED else []
    if job.search is not None:
        parts += _search(job.search, job.points, width, in_full=False)
    if row.state != JobState.SUCCEEDED:
        return "\n".join(parts)
    beside = f", beside {baseline.job_id}" if baseline is not None else ""
    table = "\n".join(_figures(row, baseline))
    parts += _table(f"figures on {printable(str(row.device_name))}{beside}", table) if table else []
    parts += _section("tasks", task_lines(row), width)
    parts += _section("checkpoint", _whereabouts(row, record), width)
    parts += _section("not measured", row.not_measured.items(), width)
    parts += _section("notes", _warnings(row), width)
    same_device = baseline is not None and may_compare(row, baseline, on_device=True)
    return "\n".join([*parts, *_why(row, baseline if same_device else None, width)])


def _figures(row: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    columns = [column for column in RESULTS_COLUMNS if column.metric_of(row) is not None]
    titles = [column_title(column, [row]) for column in columns]
    figures = [f"{show_column(column, row)} {show_relative(column, row, baseline)}".rstrip() for column in columns]
    others = [NOTHING if baseline is None else show_column(column, baseline) for column in columns]
    widths = [max(map(text_width, texts), default=0) for texts in (titles, figures)]
    for title, figure, other in zip(titles, figures, others, strict=True):
        beside = f"{GAP}(baseline {other})" if other != NOTHING else ""
        yield f"{GAP}{title.ljust(widths[0])}{GAP}{figure.ljust(widths[1])}{beside}".rstrip()


def _show_job(job: WholeJob) -> str:
    row, record, baseline = job.row, job.record, job.baseline
    if baseline is not None and not may_compare(row, baseline, on_device=True):
        baseline = None
    width = terminal_width()
    parts = [*_heading(row, width), *_section("job", _job(row, record), width), *_attempts(record)]
    parts += _section("source", _source(row, record), width)
    parts += _section("scheme", _scheme(row, record), width)
    if job.search is not None:
        parts += _search(job.search, job.points, width, in_full=True)
    if row.state == JobState.SUCCEEDED:
        parts += _measured(row, baseline, width)
    return "\n".join(parts)


def _heading(row: ResultRow, width: int) -> list[str]:
    heading = f"{row.job_id} {show_scheme(row)} of {row.model} ({row.batch_id}): {show_state(row)}"
    return wrap(printable(heading), min(width, PROSE_WIDTH))


def _section(title: str, lines: Lines, width: int) -> list[str]:
    """The section's lines, (title, text) each, under ``title``; empty if there are none."""
    texts = [(name, printable(text)) for name, text in lines]
    if not texts:
        return []
    name_width = max(len(name) for name, _ in texts)
    shown = ["", title]
    before = None
    for name, text in texts:
        first = GAP + ("" if name == before else name).ljust(name_width) + GAP
        shown += wrap(text, width, first=first, indent=" " * len(first)) if text else [first.rstrip()]
        before = name
    return shown


def _search(found: FinishedSearch, points: Mapping[int, str], width: int, *, in_full: bool) -> Iterable[str]:
    yield from _section("search", search_lines(found), width)
    yield from ["", "mixtures, as measured on the search's own text"]
    yield from frontier_table(found, points, in_full=in_full)
    yield ""
    yield from wrap("KL gained by a group of layers at 16 bits (~ by its derivative; the bar: per byte)", width)
    yield from sensitivity_lines(found, width, in_full=in_full)
    if in_full:
        yield ""
        yield from group_lines(found, width)


def _table(title: str, table: str) -> list[str]:
    return ["", title, *table.splitlines()]


def _job(row: ResultRow, record: JobRecord) -> Lines:
    if row.reused_from is not None:
        yield "result of", f"{row.reused_from}, which {_why_its_result(row)}"
    if row.state == JobState.RUNNING:
        progress = show_progress(record.progress or {})
        yield "stage", f"{record.stage} on {record.worker}" + (f", {progress}" if progress else "")
    moments = (("submitted", record.created_at), ("started", record.started_at), ("finished", record.finished_at))
    for title, moment in moments:
        if moment is not None:
            yield title, show_time(moment)
    if record.not_before is not None and row.state == JobState.QUEUED:
        yield "not before", show_time(record.not_before)
    yield "attempts", f"{record.attempt}, of which {record.failures} counted as failures"
    if record.log_path is not None:
        yield "log", f"{record.log_path} (`qbatch logs {row.job_id}` shows it)"
    if record.priority:
        yield "priority", str(record.priority)
    if record.time_limit_s is not None:
        yield "time limit", show_seconds(record.time_limit_s)


def _why_its_result(row: ResultRow) -> str:
    if row.mixture.bound is not None:
        return f"has what it looked for: {show_bound(row.mixture.bound)}"
    return "has the same checkpoint and protocol; not measured again"


def _attempts(record: JobRecord) -> list[str]:
    attempts = [attempt.to_json() for attempt in record.attempts]
    return _table("attempts", render(attempts, _ATTEMPTS, "table")) if attempts else []


def _source(row: ResultRow, record: JobRecord) -> Lines:
    yield "location", record.location
    if row.revision:
        yield "revision", row.revision
    if commit := row.details.commit:
        yield "commit", commit
    if fingerprint := row.details.fingerprint:
        yield "fingerprint", fingerprint
    if record.allow_pickle:
        yield "pickles", "allowed"


def _scheme(row: ResultRow, record: JobRecord) -> Lines:
    yield "method", "none: the unquantized model" if row.is_baseline else row.scheme
    yield "dtype", f"{row.dtype}, computing in {row.compute_dtype}"
    for name in _options(row):
        yield name, _plain(row.options[name])
    if row.recovery is not None:
        yield "adapter", f"{row.recovery.kind} of rank {row.recovery.rank}"
    if record.checkpoint_key:
        yield "checkpoint key", record.checkpoint_key
    if record.base_key:
        yield "belongs to", record.base_key
    yield from (("checkpoint", text) for _, text in _whereabouts(row, record))
    if record.checkpoint is not None:
        yield "sha256", record.checkpoint.root_sha256
        if record.checkpoint.written_by != row.job_id:
            yield "written by", record.checkpoint.written_by or "a job that was pruned"


def _whereabouts(row: ResultRow, record: JobRecord) -> Lines:
    if row.checkpoint_path:
        yield "path", row.checkpoint_path
    elif record.checkpoint is not None and row.state == JobState.SUCCEEDED:
        since = f" (noted {show_time(record.checkpoint.gone_at)})" if record.checkpoint.gone_at is not None else ""
        yield "path", f"no longer on the storage{since}; a new submit makes it again"


def _options(row: ResultRow) -> Iterable[str]:
    """The names of the options that apply to the row's method."""
    yield from (option.name for option in describe_row(row.scheme).options)
    if not row.is_baseline:
        yield from ("skip_modules", "max_shard_bytes")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "transformers' default" if value is None else str(value)


def _measured(row: ResultRow, baseline: ResultRow | None, width: int) -> Iterable[str]:
    yield from _section("protocol", _protocol(row), width)
    yield from _section("versions", _versions(row), width)
    yield from _section("size", size_lines(row), width)
    if not row.is_baseline:
        yield from _section("coverage audit", [*audit_lines(row), *(("defect", text) for text in defects(row))], width)
    yield from _section("elsewhere", loader_lines(row), width)
    table = speed_table(row)
    origin = f", measured with {row.speed_from}" if row.speed_from else ""
    yield from _table(f"speed on {printable(str(row.device_name))}{origin}", table) if table else ()
    yield from _section(f"speed by round{origin}", round_lines(row), width)
    yield from _section("times", _times(row), width)
    yield from _section(f"peak memory{origin}", memory_lines(row), width)
    yield from _section("quality", quality_lines(row), width)
    yield from _section("quality on further texts", text_lines(row), width)
    yield from _section("tasks", task_lines(row), width)
    yield from _section("energy", energy_lines(row), width)
    yield from _section("not measured", row.not_measured.items(), width)
    yield from _section("notes", _notes(row), width)
    yield from _why(row, baseline, width)


def _why(row: ResultRow, baseline: ResultRow | None, width: int) -> Iterable[str]:
    if reasons := explain_speed(row, baseline):
        yield from ["", "why", *wrap(" ".join(reasons), min(width, PROSE_WIDTH), first=GAP, indent=GAP)]


def _warnings(row: ResultRow) -> Lines:
    yield from (("warning", text) for text in audit_warnings(row))
    yield from (("emulated", text) for text in emulation_remarks([row]))


def _notes(row: ResultRow) -> Lines:
    if (origin := speed_origin(row)) is not None:
        yield "speed", f"{origin}; it was not timed itself"
    yield from (("disturbed", text) for text in fairness_remarks(row.details.flags))
    if row.details.noise_inputs is not None:
        yield "measured on", f"noise, which no figure that is compared comes from: {row.details.noise_inputs}"
    yield from (("emulated", text) for text in emulation_remarks([row]))
    if (kernels := cpu_kernel_warning(row)) is not None:
        yield "kernels", kernels
    yield from other_audits(row)


def _protocol(row: ResultRow) -> Lines:
    yield "hash", str(row.protocol_hash)
    yield "shape", show_protocol(row)
    for name, value in row.protocol.stored.items():
        yield name, str(value) if name.endswith("sha256") else show_field(name, value)


def _versions(row: ResultRow) -> Lines:
    for name, version in (row.details.versions or {}).items():
        if version is not None:
            yield name, str(version)
    if uuid := row.details.device_uuid:
        yield "device", f"{row.device_name}, {uuid}"


def _times(row: ResultRow) -> Lines:
    for title, seconds in (("quantize", row.quantize_s), ("load model", row.load_model_s)):
        if seconds is not None:
            yield title, show_seconds(seconds)
    if GRAPH_DECODE.value(row) is not None:
        origin = f", measured with {row.speed_from}" if row.speed_from else ""
        text = f"{show_metric(GRAPH_DECODE, row)}: the kernels alone, under a CUDA graph{origin}"
        yield GRAPH_DECODE.line_title, text

"""What a batch would do, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qbatch.core.job_duration import Basis, TimeEstimate
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.output_size import OutputSize
from qbatch.core.search.mixture_origin import MixtureOrigin
from qbatch.scheduler.batch_plan import BatchPlan, Earlier, PlannedJob
from qbatch.views.formats import GAP, PROSE_WIDTH, Column, Row, render, terminal_width
from qbatch.views.scheme import show_scheme
from qbatch.views.shortened import fit_names
from qbatch.views.units import show_bytes
from qbatch.views.wrapped_text import wrap

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400

COLUMNS: tuple[Column, ...] = (
    Column(key="model", title="model", fit=fit_names),
    Column(key="title", title="scheme", wraps=True),
    Column(key="shape", title="input", spare=True),
    Column(key="output", title="writes"),
    Column(key="memory", title="GPU memory"),
    Column(key="time", title="time"),
    Column(key="earlier", title="there already", spare=True),
)


def plan_rows(plan: BatchPlan) -> list[dict[str, Any]]:
    """One mapping for each job, as JSON shows it."""
    return [_row(job) for job in plan.jobs]


def _row(job: PlannedJob) -> dict[str, Any]:
    scheme, protocol = job.spec.scheme, job.spec.protocol
    estimate = job.duration if job.earlier is not Earlier.ANSWERED else None
    return {
        "model": job.spec.source.name,
        "revision": job.spec.source.revision,
        "scheme": scheme.method.value,
        "title": _title(job),
        "options": scheme.to_json(),
        "batch_size": protocol.batch_size,
        "prompt_tokens": protocol.prompt_tokens,
        "new_tokens": protocol.new_tokens,
        "output_bytes": 0 if scheme.is_baseline else job.output.nbytes if job.output is not None else None,
        "output_off_by_bytes": 0 if scheme.is_baseline else job.output.off_by if job.output is not None else None,
        "memory_bytes": job.memory_bytes,
        "vram_class_gib": job.vram_class_gib,
        "estimated_s": None if estimate is None else round(estimate.seconds, 1),
        "estimated_from": None if estimate is None else estimate.basis.value,
        "estimated_from_jobs": None if estimate is None else estimate.runs,
        "is_rough": None if estimate is None else estimate.is_rough,
        "is_at_least": None if estimate is None else estimate.is_least,
        "earlier": job.earlier.value,
        "answered_by": job.answered_by,
    }


def plan_totals(plan: BatchPlan) -> dict[str, Any]:
    return {
        "jobs": len(plan.jobs),
        "answered": len(plan.jobs) - len(plan.open_jobs),
        "undecided": sum(job.earlier is Earlier.UNKNOWN for job in plan.jobs),
        "output_bytes": sum(size.nbytes for size in plan.to_write),
        "has_unknown_sizes": plan.has_unknown_sizes,
        "free_bytes": plan.free_bytes,
        "device_s": round(plan.seconds, 1),
        "jobs_without_estimate": plan.jobs_without_estimate,
        "live_workers": plan.live_workers,
    }


def render_plan(plan: BatchPlan) -> str:
    """A table of the jobs, with each model's name in its first line, and lines that sum up."""
    rows = [_shown(job) for job in plan.jobs]
    named = [row | {"model": ""} if _is_of_model_before(rows, number) else row for number, row in enumerate(rows)]
    width = min(terminal_width(), PROSE_WIDTH)
    summary = [line for text in _summary(plan) for line in wrap(text, width, indent=GAP)]
    return "\n".join([render(named, _columns(rows), "table"), "", *summary])


def _is_of_model_before(rows: Sequence[Row], number: int) -> bool:
    return number > 0 and bool(rows[number]["model"] == rows[number - 1]["model"])


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(row[column.key] is not None for row in rows)]


def _shown(job: PlannedJob) -> dict[str, Any]:
    protocol = job.spec.protocol
    sizes = {"batch": protocol.batch_size, "prompt": protocol.prompt_tokens, "new": protocol.new_tokens}
    is_answered = job.earlier is Earlier.ANSWERED
    return {
        "model": job.spec.source.name,
        "title": _title(job),
        "shape": ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None) or None,
        "output": "nothing" if job.spec.scheme.is_baseline else _size(job.output),
        "memory": _memory(job),
        "time": None if job.duration is None or is_answered else _estimate(job.duration),
        "earlier": _earlier(job),
    }


def _title(job: PlannedJob) -> str:
    scheme = job.spec.scheme
    asked = {name: value for name, value in scheme.to_json().items() if name != "method"}
    row = ResultRow(
        batch_id="",
        job_id="",
        model=job.spec.source.name,
        state="",
        scheme=scheme.method.value,
        bits=scheme.bits(job.dtype),
        double_quant=bool(asked.get("double_quant")),
        options=asked,
        dtype=job.dtype.value,
        compute_dtype=scheme.compute_dtype.value,
        mixture=MixtureOrigin(bound=None if job.spec.search is None else job.spec.search.bound.to_json()),
    )
    return show_scheme(row)


def _size(size: OutputSize | None) -> str | None:
    if size is None:
        return None
    return show_bytes(size.nbytes) if size.off_by is not None else f"about {show_bytes(size.nbytes)}"


def _memory(job: PlannedJob) -> str | None:
    if job.memory_bytes is None:
        return None
    room = f"{job.vram_class_gib} GiB GPU" if job.vram_class_gib is not None else "more than any GPU has"
    return f"{show_bytes(job.memory_bytes)} ({room})"


def _estimate(estimate: TimeEstimate) -> str:
    return f"{_how_well_known([estimate])}{show_duration(estimate.seconds)}"


def _how_well_known(estimates: Sequence[TimeEstimate]) -> str:
    if any(estimate.is_least for estimate in estimates):
        return "over "
    return "about " if any(estimate.is_rough for estimate in estimates) else ""


def _earlier(job: PlannedJob) -> str | None:
    match job.earlier:
        case Earlier.ANSWERED:
            return f"the result of {job.answered_by}"
        case Earlier.CHECKPOINT:
            return "the checkpoint"
        case Earlier.SEARCH:
            return "what a search found"
        case Earlier.NOTHING:
            return "nothing"
        case Earlier.UNKNOWN:
            return None


def _summary(plan: BatchPlan) -> Iterator[str]:
    totals = plan_totals(plan)
    models = len({job.spec.source for job in plan.jobs})
    answered = f", {totals['answered']} of them answered by earlier results" if totals["answered"] else ""
    yield f"{models} {'model' if models == 1 else 'models'}, {len(plan.jobs)} jobs{answered}"
    if totals["undecided"]:
        whom = "them" if totals["undecided"] == len(plan.jobs) else f"{totals['undecided']} of them"
        yield f"whether earlier results answer {whom} is known once a worker has the files"
    yield _disk(plan, totals)
    yield _time(plan, totals)
    yield from _first_of_their_kind(plan)


def _first_of_their_kind(plan: BatchPlan) -> Iterator[str]:
    """What is to be known of estimates that are not from earlier jobs of that kind."""
    known = [(job.spec, job.duration) for job in plan.open_jobs]
    if any(estimate is not None and estimate.basis is Basis.PREFILLS for _, estimate in known):
        yield "no such search or training has ended yet: its passes are counted, and taken for as fast as prefills were"
    if any(estimate is not None and estimate.is_least for _, estimate in known):
        yield "no such adapter was made yet: how long that takes is not counted, only what its checkpoint alone takes"
    if any(spec.search is not None and estimate is None for spec, estimate in known):
        yield (
            "how long a search takes here is known once one that measures the same has ended, or a baseline's speed "
            "was measured"
        )


def _disk(plan: BatchPlan, totals: Mapping[str, Any]) -> str:
    rough = "about " if any(size.off_by is None for size in plan.to_write) else ""
    more = ", and those of models whose headers are not here" if plan.has_unknown_sizes else ""
    free = "" if plan.free_bytes is None else f"; {show_bytes(plan.free_bytes)} are free in {plan.storage}"
    size = f"{rough}{show_bytes(totals['output_bytes'])}" if plan.to_write else "none"
    return f"weights to write: {size}{more}{free}"


def _time(plan: BatchPlan, totals: Mapping[str, Any]) -> str:
    unknown = totals["jobs_without_estimate"]
    if unknown == len(plan.open_jobs):
        return "time: not known, since no job that measures the same has ended yet" if unknown else "time: none"
    estimates = [job.duration for job in plan.open_jobs if job.duration is not None]
    without = f"; {unknown} jobs like none before are not counted" if unknown else ""
    workers = f", of which {plan.live_workers} are live" if plan.live_workers > 1 else ""
    took = f"{_how_well_known(estimates)}{show_duration(plan.seconds)}"
    return f"time: {took} of one worker{workers}, as earlier jobs took{without}"


def short_of_disk(plan: BatchPlan) -> str | None:
    """A sentence if the checkpoints do not fit into the storage; else None."""
    needed = sum(size.nbytes for size in plan.to_write)
    if plan.free_bytes is None or needed <= plan.free_bytes:
        return None
    return (
        f"{plan.storage} has {show_bytes(plan.free_bytes)} free, {show_bytes(needed - plan.free_bytes)} too few: jobs "
        "wait until there is room"
    )


def show_duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``"""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.1f} days"

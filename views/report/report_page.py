"""A report as one HTML page, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qbatch.core.domain import JobState
from qbatch.views.comparison import Preference
from qbatch.views.formats import printable
from qbatch.views.groups import ModelRows
from qbatch.views.report.audit_entry import audit_entries
from qbatch.views.report.chart_data import scatter_charts, speed_lines
from qbatch.views.report.group_notes import GroupNotes, answers_of, remarks_of, speed_reasons_of
from qbatch.views.report.judged_group import JudgedGroup
from qbatch.views.report.model_answer import Answer, answer_of, unmeasured_answer
from qbatch.views.report.provenance import Provenance
from qbatch.views.report.report_tables import ReportTables
from qbatch.views.report.reported_batches import ReportedBatches
from qbatch.views.report.scatter_layout import MARKERS, NARROW, WIDE, scatter_layout
from qbatch.views.report.speed_colour import SCALE
from qbatch.views.report.speed_layout import MOST_LINES, speed_layout
from qbatch.views.report.speed_layout import NARROW as NARROW_SPEED
from qbatch.views.report.speed_layout import WIDE as WIDE_SPEED
from qbatch.views.report.unmeasured_job import unmeasured_jobs
from qbatch.views.table_legend import full_legend
from qbatch.views.totals import weights_saved
from qbatch.views.units import show_bytes, show_ratio, show_utc

_PACKAGE = "qbatch.views.report"
_FOLDER = "page"


def report_page(reported: ReportedBatches, preference: Preference) -> str:
    groups = reported.judged(preference)
    tables, unmeasured = ReportTables.of(groups), unmeasured_jobs(reported.jobs)
    rows = [row for judged in groups for row in judged.group.rows]
    style, script = _part("report.css"), _part("report.js")
    return (
        _environment()
        .get_template("report.jinja")
        .render(
            **_summary(reported, groups),
            **_charts(groups),
            answers=_answers(reported.models, groups),
            tables=tables,
            legend=list(full_legend(rows, tables.relatives, is_one_protocol=False)),
            task_answers=_notes(answers_of, groups),
            reasons=_notes(speed_reasons_of, groups),
            remarks=_notes(remarks_of, groups),
            energy_reason=_why_no_energy(groups),
            audits=audit_entries(groups),
            unmeasured=unmeasured,
            unmeasured_title="Failures" if all(job.has_failed for job in unmeasured) else "Without a result",
            provenance=Provenance.of(groups, reported.jobs),
            style=style,
            script=script,
            policy=f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
            "base-uri 'none'; form-action 'none'",
        )
    )


def _notes(notes_of: Callable[[JudgedGroup], GroupNotes], groups: Sequence[JudgedGroup]) -> list[GroupNotes]:
    return [notes for judged in groups if (notes := notes_of(judged)).texts]


def _answers(models: Sequence[ModelRows], groups: Sequence[JudgedGroup]) -> list[Answer]:
    """The answers of all models, in the order of submission."""
    judged: dict[str, list[Answer]] = {}
    for group in groups:
        judged.setdefault(group.model, []).append(answer_of(group))
    return [answer for model in models for answer in judged.get(model.name) or [unmeasured_answer(model)]]


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(_PACKAGE, _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )


def _visible(value: Any) -> Any:
    """Names and messages come from outside: a mark of writing direction could turn around what stands beside them."""
    if hasattr(value, "__html__") or not isinstance(value, str):
        return value
    return "\n".join(map(printable, value.split("\n")))


def _part(name: str) -> str:
    return (resources.files(_PACKAGE) / _FOLDER / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """How a content security policy names an inline part."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(reported: ReportedBatches, groups: Sequence[JudgedGroup]) -> dict[str, Any]:
    states = [job.row.state for job in reported.jobs]
    counts = {state.value: states.count(state) for state in JobState if state in states}
    picks = {judged.model for judged in groups if judged.ship is not None}
    return {
        "title": ", ".join(batch["name"] or batch["batch_id"] for batch in reported.batches) or "no batch",
        "batches": [dict(batch) | {"created": show_utc(batch["created_at"])} for batch in reported.batches],
        "made_at": show_utc(reported.made_at),
        "version": reported.version,
        "counts": counts,
        "num_jobs": len(states),
        "num_measured": states.count(JobState.SUCCEEDED),
        "num_models": len({(job.row.model, job.row.revision) for job in reported.jobs}),
        "num_picks": len(picks),
        "saved": _saved(groups),
        "devices": list(dict.fromkeys(judged.group.device_name for judged in groups)),
    }


def _saved(groups: Sequence[JudgedGroup]) -> str | None:
    """``44.9 GiB → 15.9 GiB (×0.35)``"""
    saved = weights_saved([judged.choice for judged in groups if judged.choice is not None])
    if saved is None:
        return None
    return f"{show_bytes(saved.before)} → {show_bytes(saved.after)} ({show_ratio(saved.ratio)})"


def _charts(groups: Sequence[JudgedGroup]) -> dict[str, Any]:
    lines = speed_lines(groups)
    return {
        "scatters": [
            {"data": data, "layouts": [scatter_layout(data, size) for size in (WIDE, NARROW)]}
            for data in scatter_charts(groups)
        ],
        "markers": MARKERS,
        "scale": SCALE,
        "speeds": [speed_layout(lines[:MOST_LINES], size) for size in (WIDE_SPEED, NARROW_SPEED)] if lines else [],
        "more_speeds": max(0, len(lines) - MOST_LINES),
    }


def _why_no_energy(groups: Sequence[JudgedGroup]) -> str:
    reasons = dict.fromkeys(
        reason
        for judged in groups
        for row in judged.group.rows
        if (reason := row.details.why.energy.reason or row.not_measured.get("energy"))
    )
    return "; ".join(reasons)

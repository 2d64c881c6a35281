"""Describe the protocol that a row was measured under, and how protocols and versions differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import RunShape
from qbatch.core.measured.stored_protocol import StoredProtocol
from qbatch.core.methods.registry import every_library

# Versions that can change a speed between two measurements under one protocol on one device.
_VERSIONS = ("qbatch", "torch", "transformers", *every_library(), "cuda", "driver")

NOTHING_RUN = "the size alone: nothing was run"
"""What is shown of a protocol that asks for no more than the size."""
_BY_DEFAULT = (MeasuredPart.QUALITY, MeasuredPart.SPEED)
_SHOWN = frozenset(
    {
        *("batch_size", "prompt_tokens", "new_tokens"),
        *("eval_window", "eval_stride", "eval_max_windows", "eval_text_sha256", "quality", "speed"),
    }
)


def show_protocol(row: ResultRow) -> str:
    """The shape of a measured row: ``batch 1, prompt 64, 16 new tokens; 8 windows of 256 tokens of text d95eae75``.

    It is the shape that was run, followed by the requested one if the model's maximum length shortened it. What was
    not asked for has no shape.
    """
    requested, run = row.protocol, row.details.shapes
    parts = []
    if requested.parts & {MeasuredPart.SPEED, MeasuredPart.ENERGY}:
        parts.append(_generation(run, requested))
    if MeasuredPart.QUALITY in requested.parts:
        parts.append(_windows(run, requested))
    return "; ".join(parts) or NOTHING_RUN


def _generation(run: RunShape, requested: StoredProtocol) -> str:
    prompt = _run_of(run.prompt_tokens, requested.prompt_tokens)
    new = _run_of(run.new_tokens, requested.new_tokens)
    generated = "" if run.new_tokens == 0 else f", {new} new tokens"
    return f"batch {requested.batch_size}, prompt {prompt}{generated}"


def _run_of(run: int | None, requested: int | None) -> str:
    return str(requested) if run in (None, requested) else f"{run} ({requested} requested)"


def _windows(run: RunShape, requested: StoredProtocol) -> str:
    stride = requested.eval_stride if run.eval_stride is None else run.eval_stride
    most = requested.eval_max_windows if run.eval_max_windows is None else run.eval_max_windows
    # By default windows follow each other without overlap: only another stride is worth mentioning.
    apart = "" if requested.eval_stride == requested.eval_window else f", {stride} apart"
    window, text = _run_of(run.eval_window, requested.eval_window), str(requested.eval_text_sha256)[:8]
    return f"at most {most} windows of {window} tokens{apart}, of text {text}"


def differences(first_rows: Sequence[ResultRow]) -> list[str]:
    """How groups differ, each given by one of its rows: ``prompt_tokens (64, 256)``."""
    facts = [{"device": row.device_name, **_fields(row)} for row in first_rows]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [
        f"{name} ({', '.join(values)})"
        for name in names
        if len(values := list(dict.fromkeys(show_field(name, fact.get(name)) for fact in facts))) > 1
    ]


def differences_not_in_heading(first_rows: Sequence[ResultRow]) -> list[str]:
    """The protocol fields in which groups differ and that ``show_protocol`` does not show.

    Each group is given by one of its rows.
    """
    protocols = [_fields(row) for row in first_rows]
    names = dict.fromkeys(name for protocol in protocols for name in protocol if name not in _SHOWN)
    return [name for name in names if len({show_field(name, protocol.get(name)) for protocol in protocols}) > 1]


def _fields(row: ResultRow) -> Mapping[str, Any]:
    """The stored fields, and those parts that are measured unless a protocol leaves them out."""
    return {**row.protocol.stored, **{part.value: part in row.protocol.parts for part in _BY_DEFAULT}}


def version_differences(rows: Sequence[ResultRow]) -> list[str]:
    """``torch (2.12, 2.13)``: the versions that are not the same for all of ``rows``.

    A row measured without a method's library does not count for that library.
    """
    seen = {name: _distinct_versions(name, rows) for name in _VERSIONS}
    return [
        f"{name} ({', '.join(value or 'unknown' for value in values)})"
        for name, values in seen.items()
        if len(values) > 1
    ]


def _distinct_versions(library: str, rows: Sequence[ResultRow]) -> list[str | None]:
    versions = dict.fromkeys((row.details.versions or {}).get(library) for row in rows)
    return [version for version in versions if version is not None or library not in every_library()]


def show_field(name: str, value: Any) -> str:
    """The value of a protocol field: tasks and texts by their names, hashes by their first eight digits."""
    if name in ("tasks", "more_texts"):
        return " ".join(_task(task) for task in value or ()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return str(value)[:8] if name.endswith("sha256") else str(value)


def _task(task: Mapping[str, Any]) -> str:
    return str(task["name"]) + (f"@{task['sha256'][:8]}" if task.get("sha256") else "")

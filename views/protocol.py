"""A protocol and the device in words: what a measured number belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbatch.core.measured.result_row import ResultRow, StoredProtocol
from qbatch.core.measured.speed_figures import RunShape
from qbatch.core.methods.registry import every_library

# What may change a speed between two visits of one protocol and one device.
_VERSIONS = ("qbatch", "torch", "transformers", *every_library(), "cuda", "driver")


_SHOWN = frozenset(
    {
        *("batch_size", "prompt_tokens", "new_tokens"),
        *("eval_window", "eval_stride", "eval_max_windows", "eval_text_sha256"),
    }
)


def show_protocol(row: ResultRow) -> str:
    """The shape of a measured row: ``batch 1, prompt 64, 16 new tokens; 8 windows of 256 tokens of text d95eae75``.

    The shape is the one that was run; where the model's positions clipped it, what was asked for is said too.
    """
    asked, run = row.protocol, row.details.shapes
    prompt, new = _run_of(run.prompt_tokens, asked.prompt_tokens), _run_of(run.new_tokens, asked.new_tokens)
    generated = "" if run.new_tokens == 0 else f", {new} new tokens"
    return f"batch {asked.batch_size}, prompt {prompt}{generated}; {_windows(run, asked)}"


def _run_of(run: int | None, asked: int | None) -> str:
    return str(asked) if run in (None, asked) else f"{run} (of {asked} asked for)"


def _windows(run: RunShape, asked: StoredProtocol) -> str:
    stride = asked.eval_stride if run.eval_stride is None else run.eval_stride
    most = asked.eval_max_windows if run.eval_max_windows is None else run.eval_max_windows
    # By themselves pieces follow each other: only what was asked for otherwise is worth a word.
    apart = "" if asked.eval_stride == asked.eval_window else f", {stride} apart"
    window, text = _run_of(run.eval_window, asked.eval_window), str(asked.eval_text_sha256)[:8]
    return f"at most {most} windows of {window} tokens{apart}, of text {text}"


def differences(first_rows: Sequence[ResultRow]) -> list[str]:
    """What tells groups apart, each given by one of its rows: ``prompt_tokens (64, 256)``."""
    facts = [{"device": row.device_name, **row.protocol.stored} for row in first_rows]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [
        f"{name} ({', '.join(values)})"
        for name in names
        if len(values := _distinct(show_field(name, fact.get(name)) for fact in facts)) > 1
    ]


def differences_not_in_heading(first_rows: Sequence[ResultRow]) -> list[str]:
    """The fields of the protocol in which groups differ, each given by one of its rows, and ``show_protocol`` does not
    show."""
    protocols = [row.protocol.stored for row in first_rows]
    names = dict.fromkeys(name for protocol in protocols for name in protocol if name not in _SHOWN)
    return [name for name in names if len({show_field(name, protocol.get(name)) for protocol in protocols}) > 1]


def version_differences(rows: Sequence[ResultRow]) -> list[str]:
    """``torch (2.12, 2.13)``: the versions that are not the same for all of ``rows``. A row says nothing of libraries
    that it was measured without."""
    seen = {name: _distinct((row.details.versions or {}).get(name) for row in rows) for name in _VERSIONS}
    return [f"{name} ({', '.join(values)})" for name, values in seen.items() if len(values) > 1]


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


def show_field(name: str, value: Any) -> str:
    """A protocol's field; of tasks their names, of a hash its beginning."""
    if name == "tasks":
        return " ".join(_task(task) for task in value or ()) or "none"
    if value is None:
        return "none"
    return str(value)[:8] if name.endswith("sha256") else str(value)


def _task(task: Mapping[str, Any]) -> str:
    return str(task["name"]) + (f"@{task['sha256'][:8]}" if task.get("sha256") else "")

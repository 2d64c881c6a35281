"""What lm-evaluation-harness's tasks gave, each figure with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.views.figures import Row, dig
from qbatch.views.formats import NOTHING, printable
from qbatch.views.groups import Group
from qbatch.views.noise import NOISE_MARK

_ERROR = "_stderr"


def task_lines(row: Row) -> Iterable[tuple[str, str]]:
    """Each task's figures as titles and texts."""
    reason = dig(row, "details.tasks_reason")
    if reason:
        yield "not run", reason
    for task, metric in _metrics(row):
        found = _tasks(row)[task]
        samples = found.get("n_samples")
        asked = f", {samples} questions" if samples is not None else ""
        yield f"{task} {metric}", f"{_show(found, metric)}{asked}"


def task_table(group: Group) -> Iterable[tuple[str, list[str]]]:
    """(title, a cell for each row) of every figure that a row of ``group`` has."""
    names = dict.fromkeys(name for row in group.rows for name in _metrics(row))
    for task, metric in names:
        yield (
            printable(f"{task} {metric}"),
            [_cell(row, group.baselines.get(row["job_id"]), task, metric) for row in group.rows],
        )


def _tasks(row: Row) -> Mapping[str, Mapping[str, Any]]:
    return dig(row, "details.tasks") or {}


def _metrics(row: Row) -> Iterable[tuple[str, str]]:
    """(task, metric) of each figure: what has a standard error beside it, known or not."""
    for task, found in _tasks(row).items():
        for name in found:
            if f"{name}{_ERROR}" in found:
                yield task, name


def _cell(row: Row, baseline: Row | None, task: str, metric: str) -> str:
    found = _tasks(row).get(task, {})
    if found.get(metric) is None:
        return NOTHING
    base = {} if baseline is None else _tasks(baseline).get(task, {})
    return _show(found, metric) + (f" {NOISE_MARK}" if _is_noise(found, base, metric) else "")


def _show(found: Mapping[str, Any], metric: str) -> str:
    value, error = found[metric], found[f"{metric}{_ERROR}"]
    if value is None:
        return NOTHING
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _is_noise(found: Mapping[str, Any], base: Mapping[str, Any], metric: str) -> bool:
    """Both answered the same questions, so that the errors are not independent: this one is rather too large."""
    names = (metric, f"{metric}{_ERROR}")
    values = [value for side in (found, base) for name in names if (value := side.get(name)) is not None]
    if len(values) < 4 or found.get("samples_hash") != base.get("samples_hash"):
        return False
    value, error, base_value, base_error = values
    return bool(abs(value - base_value) < math.hypot(error, base_error) or value == base_value)

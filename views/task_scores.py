"""The scores of lm-evaluation-harness tasks, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qbatch.core.measured.quality_figures import Score, TaskScores
from qbatch.core.measured.result_row import ResultRow
from qbatch.views.formats import NOTHING, printable
from qbatch.views.groups import Group
from qbatch.views.noise import NOISE_MARK


def task_lines(row: ResultRow) -> Iterable[tuple[str, str]]:
    """Yield each task's scores as (title, text)."""
    reason = row.details.tasks_reason
    if reason:
        yield "not run", reason
    for task, metric in _metrics(row):
        result = _tasks(row)[task]
        questions = f", {result.n_samples} questions" if result.n_samples is not None else ""
        yield f"{task} {metric}", f"{_show(result.scores[metric])}{questions}"


def task_table(group: Group) -> Iterable[tuple[str, list[str]]]:
    """Yield (title, a cell for each row) for every score that any row of ``group`` has."""
    names = dict.fromkeys(name for row in group.rows for name in _metrics(row))
    for task, metric in names:
        yield (
            printable(f"{task} {metric}"),
            [_cell(row, group.baselines.get(row.job_id), task, metric) for row in group.rows],
        )


def _tasks(row: ResultRow) -> Mapping[str, TaskScores]:
    return row.details.tasks or {}


def _metrics(row: ResultRow) -> Iterable[tuple[str, str]]:
    for task, result in _tasks(row).items():
        for metric in result.scores:
            yield task, metric


def _cell(row: ResultRow, baseline: ResultRow | None, task: str, metric: str) -> str:
    result = _tasks(row).get(task, TaskScores())
    score = result.scores.get(metric)
    if score is None or score.value is None:
        return NOTHING
    base = TaskScores() if baseline is None else _tasks(baseline).get(task, TaskScores())
    return _show(score) + (f" {NOISE_MARK}" if _is_noise(result, base, metric) else "")


def _show(score: Score) -> str:
    if score.value is None:
        return NOTHING
    return f"{score.value:.4f}" + (f" ± {score.error:.4f}" if score.error is not None else "")


def _is_noise(result: TaskScores, base: TaskScores, metric: str) -> bool:
    """Whether two scores on the same questions differ by less than the standard error of the difference, or not at all.

    Since both models answered the same questions, the errors are not independent, and this one is somewhat too large.
    """
    score, base_score = result.scores.get(metric), base.scores.get(metric)
    if score is None or base_score is None or result.samples_hash != base.samples_hash:
        return False
    if score.value is None or score.error is None or base_score.value is None or base_score.error is None:
        return False
    return (
        abs(score.value - base_score.value) < math.hypot(score.error, base_score.error)
        or score.value == base_score.value
    )

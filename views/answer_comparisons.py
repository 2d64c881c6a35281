"""Rows compared question by question, with their baselines or with each other: which answers differ, and by chance?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qbatch.core.measured.quality_figures import TaskScores
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.core.statistics.clusters import cluster_sums
from qbatch.core.statistics.detectable import detectable_mean, detectable_proportion
from qbatch.core.statistics.no_difference import holm, mcnemar, sign_flip, smallest_sign_flip_p
from qbatch.core.statistics.paired_difference import (
    PairedDifference,
    difference_of_clusters,
    difference_of_proportions,
)
from qbatch.views.groups import Group
from qbatch.views.scheme import show_scheme

SIGNIFICANCE = 0.05

Pair = tuple[ResultRow, ResultRow]
"""A row, and the one that it is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerComparison:
    """One task of a row and of another, its ``reference``, on the ``questions`` that both were asked.

    ``metric``: the first of the task's metrics that is a mean over its questions. ``worse`` and ``better`` are the
    numbers of questions whose score is not the reference's. ``difference`` is the row's mean score less the
    reference's. ``clusters``: how many independent groups the questions form; None if each stands for itself.
    ``adjusted_p`` is ``p_value`` corrected by Holm for all comparisons that were made together, and ``significance``
    the level that this leaves to the smallest p-value of them all.
    """

    row: ResultRow
    reference: ResultRow
    task: str
    metric: str
    higher_is_better: bool
    is_right_or_wrong: bool
    questions: int
    asked_of_one_only: int
    clusters: int | None
    worse: int
    better: int
    difference: PairedDifference
    p_value: float
    adjusted_p: float = math.nan
    significance: float = SIGNIFICANCE

    @property
    def is_shown(self) -> bool:
        """Whether a difference is shown: else there may be one all the same."""
        return self.adjusted_p <= SIGNIFICANCE

    @property
    def is_worse(self) -> bool:
        return self.is_shown and (self.difference.mean < 0) == self.higher_is_better

    @property
    def is_mcnemar(self) -> bool:
        return self.clusters is None and self.is_right_or_wrong

    @property
    def could_show(self) -> bool:
        """Whether there were enough questions or clusters to show any difference."""
        least = mcnemar(self.questions, 0) if self.is_mcnemar else smallest_sign_flip_p(self.difference.clusters)
        return least <= self.significance

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that would have been shown four times in five, even if it was the only one of
        all comparisons; None if that is not known, or none would have been."""
        if self.is_mcnemar:
            return detectable_proportion(self.worse, self.better, self.questions, significance=self.significance)
        return detectable_mean(self.difference.error, self.difference.clusters, significance=self.significance)

    @property
    def test(self) -> str:
        return "McNemar's exact test" if self.is_mcnemar else "sign-flip test"

    def as_mapping(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "task": self.task,
            "metric": self.metric,
            "job_id": self.row.job_id,
            "reference_job_id": self.reference.job_id,
            "questions": self.questions,
            "asked_of_one_only": self.asked_of_one_only,
            "clusters": self.clusters,
            "worse": self.worse,
            "better": self.better,
            "difference": self.difference.mean,
            "difference_low": self.difference.low,
            "difference_high": self.difference.high,
            "detectable_difference": self.detectable,
            "test": self.test,
            "p_value": self.p_value,
            "adjusted_p_value": self.adjusted_p,
            "difference_shown": self.is_shown,
        }


def baseline_pairs(group: Group) -> list[Pair]:
    """Each quantized row of ``group`` with its baseline, if it has one."""
    return [(row, base) for row in group.rows if (base := group.baselines.get(row.job_id)) is not None]


def compare_answers(pairs: Iterable[Pair]) -> list[AnswerComparison]:
    """Compare the rows of each pair in every task of which the answers of both are known."""
    found = [
        comparison
        for row, reference in pairs
        for task, answered in row.answers.items()
        if (other := reference.answers.get(task)) is not None
        and (comparison := _comparison(row, reference, task, answered, other)) is not None
    ]
    adjusted = holm([each.p_value for each in found])
    significance = SIGNIFICANCE / max(1, len(found))
    return [replace(each, adjusted_p=p, significance=significance) for each, p in zip(found, adjusted, strict=True)]


def _comparison(
    row: ResultRow, reference: ResultRow, task: str, answered: TaskAnswers, other: TaskAnswers
) -> AnswerComparison | None:
    metric = next((name for name in answered.values if name in other.values), None)
    if metric is None:
        return None
    scores, other_scores = _scores(answered, metric), _scores(other, metric)
    common = [name for name in scores if name in other_scores]
    if not common:
        return None
    differences = [scores[name] - other_scores[name] for name in common]
    is_right_or_wrong = {scores[name] for name in common} | {other_scores[name] for name in common} <= {0.0, 1.0}
    rises, falls = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    if answered.clusters is None and is_right_or_wrong:
        difference, p_value = difference_of_proportions(falls, rises, len(common)), mcnemar(falls, rises)
    else:
        sums, counts = cluster_sums(differences, _clusters(answered, common))
        difference, p_value = difference_of_clusters(sums, counts), sign_flip(sums)
    higher_is_better = _higher_is_better(row, task, metric)
    return AnswerComparison(
        row=row,
        reference=reference,
        task=task,
        metric=metric,
        higher_is_better=higher_is_better,
        is_right_or_wrong=is_right_or_wrong,
        questions=len(common),
        asked_of_one_only=len(scores.keys() ^ other_scores.keys()),
        clusters=None if answered.clusters is None else difference.clusters,
        worse=falls if higher_is_better else rises,
        better=rises if higher_is_better else falls,
        difference=difference,
        p_value=p_value,
    )


def _clusters(answers: TaskAnswers, questions: Sequence[str]) -> Sequence[Hashable]:
    """The cluster of each of ``questions``; its own if all are independent."""
    if answers.clusters is None:
        return questions
    of = dict(zip(answers.names(), answers.clusters, strict=True))
    return [of[question] for question in questions]


def _scores(answers: TaskAnswers, metric: str) -> dict[str, float]:
    """The scores by question, of those that have one."""
    named = zip(answers.names(), answers.values[metric], strict=True)
    return {name: score for name, score in named if score is not None}


def _higher_is_better(row: ResultRow, task: str, metric: str) -> bool:
    directions = (row.details.tasks or {}).get(task, TaskScores()).higher_is_better or {}
    return directions.get(metric.partition(",")[0]) is not False


def why_not_compared(group: Group) -> str | None:
    """Which rows were asked tasks before each answer was stored, so that their scores alone are known."""
    old = [row.job_id for row in group.rows if row.details.tasks and not row.protocol.has_answers]
    if not old:
        return None
    return (
        f"How each question of the tasks was answered was not stored with {', '.join(old)}, so no test compares their "
        "answers; measured anew, they are."
    )


def say(comparison: AnswerComparison) -> str:
    """The comparison in words, which never call two models equal."""
    c = comparison
    what = "answers" if c.is_right_or_wrong else "scores"
    clusters = "" if c.clusters is None else f" in {c.clusters} clusters"
    verdict = "worse" if c.is_worse else "better" if c.is_shown else "no difference shown"
    changed = f"{c.worse} are worse than those of {c.reference.job_id} and {c.better} better"
    p_value = f"p = {c.adjusted_p:.2g} ({c.test}, Holm)"
    return (
        f"{c.row.job_id} {show_scheme(c.row)}, {c.task} {c.metric}: of {c.questions} {what}{clusters}, {changed}; "
        f"{c.difference.mean:+.4f} ({_interval(c)}), {p_value}: {verdict}{_power(c)}."
    )


def _interval(c: AnswerComparison) -> str:
    low, high = c.difference.low, c.difference.high
    return "its error is not known" if low is None or high is None else f"95 % interval {low:+.4f} to {high:+.4f}"


def _power(c: AnswerComparison) -> str:
    if c.is_shown:
        return ""
    if not c.could_show:
        return f", and so few {'questions' if c.clusters is None else 'clusters'} could have shown none"
    detectable = c.detectable
    return "" if detectable is None else f", where one of {detectable:.2g} would have been found four times in five"

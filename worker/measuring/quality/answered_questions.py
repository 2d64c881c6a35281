"""The answers to each question, taken from an evaluation by lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.core.measured.task_answers import HASH_DIGITS, TaskAnswers

# The keys of the hashes that the harness makes itself: of the document, the prompt and the target.
_HASHES = ("doc_hash", "prompt_hash", "target_hash")
# A text of at least so many characters that several documents have is a passage that they are about.
_PASSAGE_CHARACTERS = 100
_ROUNDING = 1e-9
# With fewer clusters, the signs of all are alike by chance in more than one case of 20, so they show no difference.
_FEWEST_TASKS = 6

Sample = Mapping[str, Any]


def answered_questions(evaluation: Mapping[str, Any]) -> dict[str, TaskAnswers]:
    """The answers by task, or by group of tasks where the group has scores of its own and enough tasks.

    Only scores that are the mean over their questions are included: of others, as of BLEU or a perplexity, a question
    has no score of its own.
    """
    samples, groups = evaluation["samples"], evaluation.get("group_subtasks", {})
    # A task of which no question was asked is none.
    tasks = {
        name: frozenset(task for task in _tasks(name, groups) if samples.get(task)) for name in evaluation["results"]
    }
    answers = {
        name: answered
        for name, results in evaluation["results"].items()
        if (len(tasks[name]) == 1 or len(tasks[name]) >= _FEWEST_TASKS)
        and (answered := _answers([samples[task] for task in sorted(tasks[name])], results))
    }
    return {name: each for name, each in answers.items() if not any(tasks[name] < tasks[other] for other in answers)}


def _tasks(name: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks of a group and of the groups in it; of a task, the task itself."""
    if not groups.get(name):
        yield name
    for member in groups.get(name, ()):
        yield from _tasks(member, groups)


def _answers(tasks: Sequence[Sequence[Sample]], results: Mapping[str, Any]) -> TaskAnswers | None:
    """The answers to all ``tasks``; None if none of ``results`` is a mean over them."""
    by_filter: dict[str, list[Sample]] = defaultdict(list)
    for samples in tasks:
        for sample in samples:
            by_filter[sample["filter"]].append(sample)
    values = {
        score.label: each
        for score in scores_of(results)
        if (each := _mean_of(by_filter.get(score.answer_filter, ()), score.metric, score.value)) is not None
    }
    if not values:
        return None
    asked = next(iter(by_filter.values()))
    return TaskAnswers(
        questions="".join(map(_question, asked)),
        values=values,
        clusters=_clusters_of_tasks(tasks) if len(tasks) > 1 else _clusters_of_passages(asked),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessScore:
    """A score as the harness reports it. ``label``: its name here."""

    label: str
    metric: str
    answer_filter: str
    value: Any


def scores_of(results: Mapping[str, Any]) -> Iterator[HarnessScore]:
    """Yield the scores among the ``results`` of a task or group."""
    for key, value in results.items():
        metric, comma, answer_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            # The harness calls unfiltered answers "none".
            label = metric if answer_filter == "none" else key
            yield HarnessScore(label=label, metric=metric, answer_filter=answer_filter, value=value)


def _mean_of(samples: Iterable[Sample], metric: str, mean: Any) -> tuple[float | None, ...] | None:
    """The scores of ``samples`` if ``mean`` is their mean, else None."""
    scores = [sample.get(metric) for sample in samples]
    known = [score for score in scores if score is not None]
    # NumPy's numbers and booleans are numbers here, and tuples are not.
    if not known or not all(isinstance(score, int | float) or hasattr(score, "item") for score in known):
        return None
    numbers = [None if score is None else float(score) for score in scores]
    if not math.isclose(math.fsum(map(float, known)) / len(known), float(mean), rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        return None
    return tuple(numbers)


def _question(sample: Sample) -> str:
    return hashlib.sha256("".join(str(sample[key]) for key in _HASHES).encode()).hexdigest()[:HASH_DIGITS]


def _clusters_of_tasks(tasks: Sequence[Sequence[Sample]]) -> tuple[int, ...]:
    first_filter = tasks[0][0]["filter"]
    return tuple(
        number for number, samples in enumerate(tasks) for sample in samples if sample["filter"] == first_filter
    )


def _clusters_of_passages(samples: Sequence[Sample]) -> tuple[int, ...] | None:
    """A number for each question, the same for those whose documents share a long text; None if none do.

    A text that all documents have is no passage but an instruction.
    """
    parents = list(range(len(samples)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for numbers in _shared_texts(samples):
        for number in numbers[1:]:
            parents[root(number)] = root(numbers[0])
    clusters = tuple(root(number) for number in range(len(samples)))
    return None if len(set(clusters)) == len(samples) else clusters


def _shared_texts(samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Yield, for each long text that several documents have, but not all, the numbers of the samples that have it."""
    having: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        for field, value in sample["doc"].items():
            if isinstance(value, str) and len(value) >= _PASSAGE_CHARACTERS:
                having[field, value].append(number)
    for numbers in having.values():
        if 1 < len(numbers) < len(samples):
            yield numbers

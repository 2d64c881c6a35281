"""What is kept of a harness's evaluation, question by question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.core.statistics.no_difference import sign_flip
from qbatch.views.answer_comparisons import SIGNIFICANCE
from qbatch.worker.measuring.quality.answered_questions import answered_questions

PASSAGE = "The lamp stood in the rain, and nobody had thought of bringing it in. " * 3


def asked(*scores: Any, metric: str = "acc", answer_filter: str = "none", docs: Iterable[Any] = ()) -> list[Any]:
    """The samples of questions with these scores."""
    documents = list(docs) or [{"question": f"number {number}"} for number in range(len(scores))]
    return [
        {
            "doc": doc,
            "filter": answer_filter,
            "doc_hash": str(doc),
            "prompt_hash": "prompt",
            "target_hash": "target",
            **({} if score is None else {metric: score}),
        }
        for score, doc in zip(scores, documents, strict=True)
    ]


def evaluated(
    samples: Mapping[str, list[Any]], results: Mapping[str, Mapping[str, Any]], **groups: list[str]
) -> dict[str, TaskAnswers]:
    return answered_questions({"samples": samples, "results": results, "group_subtasks": groups})


def test_each_question_has_its_score_and_a_hash() -> None:
    found = evaluated({"quiz": asked(1.0, 0.0, 1.0)}, {"quiz": {"acc,none": 2 / 3, "acc_stderr,none": 0.3}})["quiz"]
    assert found.count == 3
    assert found.values == {"acc": (1.0, 0.0, 1.0)}
    assert found.clusters is None
    assert len(set(found.names())) == 3
    assert TaskAnswers.from_json(found.to_json()) == found


def test_a_question_that_is_asked_twice_has_two_names() -> None:
    docs = [{"question": "same"}] * 2
    found = evaluated({"quiz": asked(1.0, 0.0, docs=docs)}, {"quiz": {"acc,none": 0.5}})["quiz"]
    first, second = found.names()
    assert first.split("/")[0] == second.split("/")[0]
    assert first != second


def test_a_score_that_is_no_mean_over_its_questions_is_left_out() -> None:
    samples = [one | {"bleu": ("a", "b"), "byte_perplexity": 1.5} for one in asked(1.0, 0.0)]
    results = {"quiz": {"acc,none": 0.5, "bleu,none": 17.0, "byte_perplexity,none": 2.8}}
    assert evaluated({"quiz": samples}, results)["quiz"].values == {"acc": (1.0, 0.0)}
    assert evaluated({"quiz": samples}, {"quiz": {"bleu,none": 17.0}}) == {}


def test_a_question_without_that_score_has_none() -> None:
    assert evaluated({"quiz": asked(1.0, None)}, {"quiz": {"acc,none": 1.0}})["quiz"].values == {"acc": (1.0, None)}


def test_each_filter_has_its_scores_of_the_same_questions() -> None:
    strict = asked(0, 1, metric="exact_match", answer_filter="strict")
    loose = asked(1, 1, metric="exact_match", answer_filter="loose")
    results = {"sums": {"exact_match,strict": 0.5, "exact_match,loose": 1.0}}
    found = evaluated({"sums": strict + loose}, results)["sums"]
    assert found.count == 2
    assert found.values == {"exact_match,strict": (0.0, 1.0), "exact_match,loose": (1.0, 1.0)}


def test_questions_about_one_passage_are_a_cluster() -> None:
    docs = [
        {"passage": passage, "task": "Read what follows and answer in one word, which you find in it. " * 3}
        for passage in (PASSAGE, PASSAGE + "a", PASSAGE, PASSAGE + "b")
    ]
    clusters = evaluated({"read": asked(1, 0, 1, 0, docs=docs)}, {"read": {"acc,none": 0.5}})["read"].clusters
    assert clusters is not None
    assert clusters[0] == clusters[2]
    assert len(set(clusters)) == 3


def test_the_tasks_of_a_group_are_its_clusters() -> None:
    languages = [f"language {number}" for number in range(4)]
    samples = {"physics": asked(1, 0), "history": asked(1, 1, 1), "alone": asked(0, 1)}
    samples |= {language: asked(1) for language in languages}
    results = {
        "subjects": {"acc,none": 8 / 9},
        "sciences": {"acc,none": 0.5},
        **{task: {"acc,none": score} for task, score in {"physics": 0.5, "history": 1.0, "alone": 0.5}.items()},
    }
    found = evaluated(samples, results, subjects=["sciences", "history", *languages], sciences=["physics"])
    assert set(found) == {"subjects", "alone"}
    assert found["subjects"].values == {"acc": (1.0,) * 8 + (0.0,)}
    assert found["subjects"].clusters == (0, 0, 0, 1, 2, 3, 4, 5, 5)


def test_of_too_few_tasks_to_show_a_difference_each_stands_alone() -> None:
    """The signs of five clusters are alike by chance in two of 32 cases, however many answers they hold."""
    tasks = [f"language {number}" for number in range(5)]
    assert sign_flip([-100.0] * len(tasks)) > SIGNIFICANCE >= sign_flip([-100.0] * (len(tasks) + 1))
    results = {key: {"acc,none": 1.0} for key in [*tasks, "group"]}
    found = evaluated({task: asked(1, 1) for task in tasks}, results, group=tasks)
    assert set(found) == set(tasks)
    assert all(each.clusters is None for each in found.values())


def test_the_tasks_of_a_group_without_a_score_of_its_own_stand_alone() -> None:
    """Neither one whose score weighs each task alike is the mean over the questions."""
    samples, results = {"a": asked(1, 0), "b": asked(1, 1, 1)}, {"a": {"acc,none": 0.5}, "b": {"acc,none": 1.0}}
    for of_group in ({}, {"acc,none": 0.75}):
        assert set(evaluated(samples, {"both": of_group} | results, both=["a", "b"])) == {"a", "b"}


def test_a_task_without_questions_is_no_part_of_its_group() -> None:
    """As with --task-limit on a task whose documents were all filtered out."""
    tasks = [f"language {number}" for number in range(7)]
    samples = {task: asked(1, 0) if number else [] for number, task in enumerate(tasks)}
    found = evaluated(samples, {"group": {"acc,none": 0.5}}, group=tasks)["group"]
    assert found.count == 12
    assert found.clusters == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    results = {key: {"acc,none": 0.5} for key in [*tasks, "group"]}
    few = evaluated({task: samples[task] for task in tasks[:6]}, results, group=tasks[:6])
    assert set(few) == set(tasks[1:6]), "five that have questions are too few for a group"

"""Rows compared question by question: what is counted, how it is tested, and what is said."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qbatch.core.measured.task_answers import TaskAnswers
from qbatch.core.statistics.detectable import detectable_proportion
from qbatch.views.answer_comparisons import AnswerComparison, baseline_pairs, compare_answers, say
from qbatch.views.choices import told_apart_by_answers
from qbatch.views.comparison import Preference
from qbatch.views.groups import Group, models_of
from qbatch.views.recommend import recommend
from tests.unit.printed import comparison, read
from tests.unit.test_compare import BASELINE, FP4, INT8, NF4, by_window
from tests.unit.test_views import on_terminal


def answers(scores: Sequence[float | None], *, clusters: Sequence[int] | None = None, skip: int = 0) -> TaskAnswers:
    """The scores of questions that are numbered from ``skip`` on."""
    return TaskAnswers(
        questions="".join(f"{number:016x}" for number in range(skip, skip + len(scores))),
        values={"acc": tuple(scores)},
        clusters=None if clusters is None else tuple(clusters),
    )


def group_of(by_job: Mapping[str, TaskAnswers], *rows: dict[str, Any]) -> Group:
    stored = {job_id: {"quiz": answered} for job_id, answered in by_job.items()}
    (model,) = models_of([replace(row, answers=stored.get(row.job_id, {})) for row in read(list(rows))])
    return model.groups[0]


def compared(*of: TaskAnswers, **direction: bool) -> AnswerComparison:
    """The quantized row's answers, the second, against the baseline's."""
    tasks = {"quiz": {"higher_is_better": {"acc": direction.get("higher_is_better", True)}}}
    details = NF4["details"] | {"tasks": tasks}
    group = group_of(dict(zip(("j1", "j3"), of, strict=True)), BASELINE, NF4 | {"details": details})
    (found,) = compare_answers(baseline_pairs(group))
    return found


def right(lost: int, gained: int, same: int) -> tuple[TaskAnswers, TaskAnswers]:
    base = [1.0] * lost + [0.0] * gained + [1.0] * same
    return answers(base), answers([1.0 - score for score in base[: lost + gained]] + base[lost + gained :])


def test_changed_answers_are_counted_in_both_directions() -> None:
    found = compared(*right(lost=7, gained=2, same=91))
    assert (found.questions, found.worse, found.better, found.clusters) == (100, 7, 2, None)
    assert found.difference.mean == pytest.approx(-0.05)
    # Two or fewer, or seven or more, of nine tosses.
    tosses = list(itertools.product((0, 1), repeat=9))
    assert found.p_value == pytest.approx(sum(sum(each) not in range(3, 7) for each in tosses) / 2**9)
    assert found.test == "McNemar's exact test"
    assert not found.is_shown


def test_a_metric_of_which_less_is_better_turns_round() -> None:
    found = compared(*right(lost=20, gained=1, same=80), higher_is_better=False)
    assert (found.worse, found.better) == (1, 20)
    assert found.is_shown
    assert not found.is_worse


def test_answers_about_one_passage_count_together() -> None:
    """Of 6 passages with four questions each, four got worse as a whole: 2 in 16 assignments of signs, not 2 in 2¹⁶."""
    clusters = [number // 4 for number in range(24)]
    base, worse = [1.0] * 24, [0.0] * 16 + [1.0] * 8
    found = compared(answers(base, clusters=clusters), answers(worse, clusters=clusters))
    assert (found.clusters, found.worse, found.test) == (6, 16, "sign-flip test")
    assert found.p_value == 2 / 16
    assert found.difference.error == pytest.approx(np.std([-1, -1, -1, -1, 0, 0], ddof=1) / np.sqrt(6))


def test_scores_other_than_right_or_wrong_take_sign_flips() -> None:
    base, other = [0.5, 0.25, 1.0, 0.75], [0.4, 0.25, 0.7, 0.5]
    found = compared(answers(base), answers(other))
    assert (found.worse, found.better, found.test, found.clusters) == (3, 0, "sign-flip test", None)
    assert found.p_value == 2 / 8
    assert found.difference.mean == pytest.approx(np.mean(other) - np.mean(base))


def test_only_questions_that_both_were_asked_are_compared() -> None:
    found = compared(answers([1.0, 0.0, 1.0, None]), answers([1.0, 1.0, 1.0, 1.0], skip=1))
    assert (found.questions, found.asked_of_one_only, found.worse, found.better) == (2, 3, 0, 1)


def test_nothing_in_common_is_not_compared() -> None:
    for by_job in ({"j1": answers([1.0]), "j3": answers([1.0], skip=1)}, {"j1": answers([1.0])}, {}):
        assert compare_answers(baseline_pairs(group_of(by_job, BASELINE, NF4))) == []


def test_more_comparisons_need_stronger_evidence() -> None:
    base, worse = right(lost=8, gained=1, same=91)
    alone = group_of({"j1": base, "j3": worse}, BASELINE, NF4)
    (found,) = compare_answers(baseline_pairs(alone))
    assert found.adjusted_p == found.p_value == pytest.approx(20 / 512)
    assert found.is_worse
    several = group_of({"j1": base, "j2": base, "j3": worse}, BASELINE, INT8, NF4)
    int8, nf4 = compare_answers(baseline_pairs(several))
    assert (int8.adjusted_p, nf4.adjusted_p) == (1.0, pytest.approx(40 / 512))
    assert not nf4.is_shown


def test_what_is_not_shown_is_never_called_equal() -> None:
    for lost, gained in ((0, 0), (3, 2)):
        said = say(compared(*right(lost=lost, gained=gained, same=200)))
        assert "no difference shown, where one of 0.0" in said
        assert "would have been found four times in five" in said
        assert "equal" not in said
        assert "same" not in said


def test_too_few_questions_are_said_to_show_nothing() -> None:
    found = compared(*right(lost=1, gained=0, same=4))
    assert (found.could_show, found.detectable) == (False, None)
    assert say(found).endswith("Holm): no difference shown, and so few questions could have shown none.")
    clusters = [number // 6 for number in range(24)]
    found = compared(answers([1.0] * 24, clusters=clusters), answers([0.0] * 2 + [1.0] * 22, clusters=clusters))
    assert say(found).endswith("no difference shown, and so few clusters could have shown none.")


def test_clusters_of_which_none_changed_prove_nothing() -> None:
    clusters = [number // 5 for number in range(50)]
    found = compared(answers([1.0] * 50, clusters=clusters), answers([1.0] * 50, clusters=clusters))
    assert (found.difference.low, found.detectable, found.could_show) == (None, None, True)
    assert "+0.0000 (its error is not known), p = 1 (sign-flip test, Holm): no difference shown." in say(found)


def test_more_comparisons_leave_only_larger_differences_to_be_shown() -> None:
    base, other = right(lost=1, gained=1, same=98)
    (alone,) = compare_answers(baseline_pairs(group_of({"j1": base, "j3": other}, BASELINE, NF4)))
    several = group_of({"j1": base, "j2": other, "j3": other}, BASELINE, INT8, NF4)
    beside, _ = compare_answers(baseline_pairs(several))
    assert alone.detectable == detectable_proportion(1, 1, 100, significance=0.05)
    assert beside.detectable == detectable_proportion(1, 1, 100, significance=0.025)
    assert (beside.detectable or 0.0) > (alone.detectable or 0.0) > 0.05


def test_what_is_shown_is_said_with_its_interval() -> None:
    said = say(compared(*right(lost=20, gained=2, same=178)))
    assert said.startswith(
        "j3 bnb-nf4, quiz acc: of 200 answers, 20 are worse than those of j1 and 2 better; -0.0900 (95"
    )
    assert said.endswith("Holm): worse.")


def test_compare_says_it_and_writes_it_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    base, worse = right(lost=20, gained=2, same=178)
    rows = [BASELINE | {"answers": {"quiz": base.to_json()}}, NF4 | {"answers": {"quiz": worse.to_json()}}]
    on_terminal(monkeypatch, 400)
    (found,) = compare_answers(baseline_pairs(group_of({"j1": base, "j3": worse}, BASELINE, NF4)))
    assert say(found) in " ".join(comparison(rows, Preference(), by="figure", format="table").split())
    (model,) = json.loads(comparison(rows, Preference(), by="figure", format="json"))
    (written,) = model["groups"][0]["answers_compared"]
    assert (written["task"], written["job_id"], written["reference_job_id"]) == ("quiz", "j3", "j1")
    assert (written["worse"], written["better"], written["difference_shown"]) == (20, 2, True)
    assert written["adjusted_p_value"] == found.adjusted_p


def test_of_rows_that_stored_no_answers_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1.0 kept the scores alone, and its protocol says so."""
    on_terminal(monkeypatch, 400)
    scored = {"tasks": {"quiz": {"acc": 0.5}}}

    def said(version: dict[str, int]) -> str:
        asked = [row | {"details": row["details"] | scored} for row in (BASELINE, NF4)]
        rows = [row | {"protocol": row["protocol"] | version} for row in asked]
        return " ".join(comparison(rows, Preference(), by="figure", format="table").split())

    sentence = (
        "How each question of the tasks was answered was not stored with j1, j3, so no test compares their answers"
    )
    assert sentence in said({})
    assert "was not stored" not in said({"tasks_version": 2})


NEAR = by_window(NF4, 10.0, 20.0, 30.0, 40.0)
AS_NEAR = by_window(FP4, 10.9, 19.5, 29.4, 40.4)


def test_where_kl_does_not_tell_two_schemes_apart_their_answers_do() -> None:
    base = answers([1.0] * 100)
    wrong = answers([0.0] * 20 + [1.0] * 80)
    chosen = recommend(group_of({"j1": base, "j3": wrong, "j4": base}, BASELINE, NEAR, AS_NEAR), Preference())
    assert chosen.ship is not None
    assert chosen.ship.job_id == "j4"
    assert "In quiz, the answers of bnb-nf4 (j3) are worse." in chosen.sentence
    undecided = recommend(group_of({"j1": base, "j3": base, "j4": base}, BASELINE, NEAR, AS_NEAR), Preference())
    assert undecided.ship is not None
    assert undecided.ship.job_id == "j3"
    assert "Their answers to tasks show no difference either." in undecided.sentence


def test_answers_are_asked_for_only_where_they_may_decide() -> None:
    """They are most of a database: what marks the pick reads those of rows that nothing else tells apart."""

    def rows(*of: dict[str, Any], tasks: bool = True) -> list[Any]:
        scores = {"tasks": {"quiz": {"acc": 0.5}}} if tasks else {}
        return read([row | {"details": row["details"] | scores} for row in of])

    assert told_apart_by_answers(rows(BASELINE, NEAR, AS_NEAR), Preference()) == {"j3", "j4"}
    assert told_apart_by_answers(rows(BASELINE, NEAR, AS_NEAR, tasks=False), Preference()) == set()
    assert told_apart_by_answers(rows(BASELINE, NEAR), Preference()) == set()


def test_without_answers_it_is_said_that_tasks_may_decide() -> None:
    assert (
        "Answers to tasks (--tasks) may tell them apart."
        in recommend(group_of({}, BASELINE, NEAR, AS_NEAR), Preference()).sentence
    )

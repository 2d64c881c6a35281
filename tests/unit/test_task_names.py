"""Names of tasks are looked up without importing the harness."""

from __future__ import annotations

import pytest

from qbatch.scheduler import task_names
from qbatch.scheduler.task_names import unknown_tasks


def test_tasks_groups_and_tags_of_the_harness_are_known() -> None:
    assert (
        unknown_tasks(["hellaswag", "arc_easy", "mmlu", "acp_bench_hard", "RC_tasks", "anli", "flores_afr-eng"]) == []
    )


def test_what_no_file_mentions_is_unknown() -> None:
    assert unknown_tasks(["hellaswg", "arc_easy", "no_such_task"]) == ["hellaswg", "no_such_task"]
    assert unknown_tasks([]) == []


def test_without_the_harness_nothing_is_known_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_names, "_tasks_folder", lambda: None)
    assert unknown_tasks(["no_such_task"]) == []

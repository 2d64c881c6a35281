"""docs/glossary.md explains what tables and messages say of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbatch.core.domain import JobState, Stage
from qbatch.core.errors import ERROR_KINDS
from qbatch.core.measured.metrics import COMPARED_METRICS

LINES = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
# A line may explain several terms.
TERMS = {
    term for line in LINES if line.startswith("| ") for term in line.split(" | ")[0].removeprefix("| ").split(", ")
}


@pytest.mark.parametrize("term", [*JobState, *Stage, *ERROR_KINDS])
def test_each_state_stage_and_error_kind_has_a_line(term: str) -> None:
    assert len([line for line in LINES if line.startswith(f"| `{term}` | ")]) == 1


def test_each_heading_of_results_and_compare_has_a_line() -> None:
    assert {metric.label for metric in COMPARED_METRICS} - TERMS == set()

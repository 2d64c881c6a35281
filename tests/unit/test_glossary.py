"""docs/glossary.md explains what tables and messages say of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from qbatch.core.domain import JobState, Stage
from qbatch.core.errors import ERROR_KINDS

LINES = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("term", [*JobState, *Stage, *ERROR_KINDS])
def test_each_state_stage_and_error_kind_has_a_line(term: str) -> None:
    assert len([line for line in LINES if line.startswith(f"| `{term}` | ")]) == 1

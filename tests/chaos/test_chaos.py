"""A short run of ``make chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import parse, report, run

pytestmark = pytest.mark.timeout(900)


def test_under_fire_every_job_ends_exactly_once_and_nothing_is_left(tmp_path: Path) -> None:
    options = parse(["--kills", "12", "--jobs", "40", "--models", "4", "--gap", "1", "--seed", "19"])
    outcomes = run(options, tmp_path)
    total = report(outcomes, options)
    assert total.problems == []
    assert sum(outcome.kills for outcome in outcomes) == 12
    assert total.figures["jobs"] >= 40
    assert total.figures["searches"] > 0
    assert total.figures["adapters"] > 0

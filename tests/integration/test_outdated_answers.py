"""Rows that lack what can be measured now answer no job: a comparison, or what failed for a reason that may pass."""

from __future__ import annotations

import errno
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import BASELINE
from qbatch.core.measured.quality_figures import BASE_OUTPUTS_MISSING
from qbatch.models_db.finished_results import Finished, answers_beside
from qbatch.worker.measuring import model_benchmark
from tests import tiny
from tests.integration.test_shared_speeds import NF4, ProcesslessWorker, rows_of, submit
from tests.integration.test_shared_speeds import two_quick_rounds as two_quick_rounds
from tests.integration.test_shared_speeds import worker as worker

NOW = datetime(2026, 11, 29, tzinfo=UTC)
BASE, OTHER = ("base", "protocol"), ("nf4", "protocol")


@pytest.mark.slow
def test_what_was_measured_without_a_baseline_is_compared_beside_one(worker: ProcesslessWorker, tmp_path: Path) -> None:
    """And then its row answers, though the older one still does for a batch without a baseline."""
    models = [tiny.make_causal(tmp_path / "llama")]
    (alone,) = submit(worker, models, NF4)
    worker.work_on(alone)
    (row,) = rows_of(worker, alone)
    assert (row.details.quality.reason or "").startswith(BASE_OUTPUTS_MISSING)
    (again,) = submit(worker, models, NF4)
    worker.work_on(again)
    assert [row.reused_from for row in rows_of(worker, again)] == [f"j{alone[0]}"]
    (both,) = submit(worker, models, BASELINE, NF4)
    worker.work_on(both)
    base, nf4 = rows_of(worker, both)
    assert (base.reused_from, nf4.reused_from) == (None, None)
    assert nf4.kl_mean is not None
    (third,) = submit(worker, models, BASELINE, NF4)
    worker.work_on(third)
    assert [row.reused_from for row in rows_of(worker, third)] == [f"j{job_id}" for job_id in both]


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), False),
        (ImportError("this model needs einops"), False),
        (ValueError("this model has no such layer"), True),
    ],
    ids=["storage", "not installed", "model"],
)
def test_what_a_worker_could_not_measure_is_measured_again(
    worker: ProcesslessWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, answers: bool
) -> None:
    def fail(*_: Any) -> None:
        raise error

    models = [tiny.make_causal(tmp_path / "llama")]
    with monkeypatch.context() as patch:
        patch.setattr(model_benchmark, "measure_size", fail)
        (first,) = submit(worker, models, NF4)
        worker.work_on(first)
    (row,) = rows_of(worker, first)
    assert str(error) in row.not_measured["speed"]
    (again,) = submit(worker, models, NF4)
    worker.work_on(again)
    (row,) = rows_of(worker, again)
    assert (row.reused_from == f"j{first[0]}") is answers
    assert (row.decode_tokens_per_s is None) is answers
    (third,) = submit(worker, models, NF4)
    worker.work_on(third)
    (row,) = rows_of(worker, third)
    assert row.reused_from == f"j{(first if answers else again)[0]}"


def a_row(*, at_s: float = 0.0, lacks_outputs: bool = False) -> Finished:
    return Finished(job_id=1, parts=(), finished_at=NOW + timedelta(seconds=at_s), lacks_outputs=lacks_outputs)


@pytest.mark.parametrize(
    ("finished", "answers"),
    [
        ({OTHER: a_row()}, True),
        ({OTHER: a_row(lacks_outputs=True)}, False),
        ({OTHER: a_row(lacks_outputs=True), BASE: a_row(at_s=1.0)}, False),
        # Its outputs had been removed, and nothing computes them again.
        ({OTHER: a_row(lacks_outputs=True), BASE: a_row(at_s=-1.0)}, True),
    ],
    ids=["compared", "the baseline is to be measured", "it was measured since", "it was measured before"],
)
def test_a_row_answers_unless_its_baseline_is_newer(finished: dict[tuple[str, str], Finished], answers: bool) -> None:
    assert (OTHER in answers_beside({BASE}, finished)) is answers
    assert OTHER in answers_beside(set(), finished), "nothing could be compared"

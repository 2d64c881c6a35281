"""``--tasks`` through the installed program: from a YAML file here to the figures of every width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import quiz
from tests.acceptance.conftest import Qbatch


def test_a_task_of_a_file_is_measured_for_the_base_and_for_8_bits(
    qbatch: Qbatch, model_list: Callable[..., str], tmp_path: Path
) -> None:
    model = quiz.make_taught(tmp_path / "taught")
    path = quiz.write_quiz(tmp_path / "quiz", metric_list=[{"metric": "acc"}, {"metric": "brier_score"}])
    options = ("run", "--models", model_list(model), "--bits", "8", "--device", "cpu", "--format", "json")
    base, int8 = json.loads(qbatch(*options, "--tasks", str(path)).stdout)
    assert [base["state"], int8["state"]] == ["succeeded"] * 2, base["error_message"]
    for row, folder in ((base, model), (int8, Path(int8["checkpoint_path"]))):
        figures, scores = row["details"]["tasks"]["quiz"], quiz.log_likelihoods(folder)
        assert figures["acc"] == quiz.accuracy(scores) == quiz.TAUGHT_ACCURACY
        assert figures["brier_score"] == pytest.approx(quiz.brier_score(scores), rel=0.02)
        assert figures["n_samples"] == len(quiz.QUESTIONS)
        assert row["details"]["versions"]["lm_eval"]
    for name in ("config_hash", "samples_hash"):
        assert base["details"]["tasks"]["quiz"][name] == int8["details"]["tasks"]["quiz"][name]
    assert base["protocol_hash"] == int8["protocol_hash"]
    assert int8["baseline_job_id"] == base["job_id"]

    # The same file elsewhere is the same task: answered. Fewer questions are another protocol: not.
    moved = shutil.copytree(tmp_path / "quiz", tmp_path / "moved") / "quiz.yaml"
    asked = ("submit", *options[1:-2], "--tasks", str(moved))
    assert qbatch.json(*asked)["answered"] == 2
    assert qbatch.json(*asked, "--task-limit", "4")["answered"] == 0


def test_a_task_that_would_run_code_is_refused_at_submit(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    path = quiz.write_quiz(tmp_path)
    path.write_text(f"{path.read_text()}process_docs: !function utils.process\n")
    done = qbatch("submit", "--models", model_list(models / "llama"), "--bits", "8", "--tasks", str(path), code=2)
    assert "!function utils.process is code" in done.stderr
    assert done.stdout == ""
    assert qbatch.json("status") == []


def test_a_name_that_the_harness_does_not_know_is_refused_at_submit(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    listed = model_list(models / "llama")
    done = qbatch("submit", "--models", listed, "--bits", "16", "--tasks", "no_such_task", code=2)
    assert "has no task 'no_such_task'" in done.stderr
    assert qbatch.json("status") == []

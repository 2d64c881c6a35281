"""lm-evaluation-harness's tasks on tiny models: what is measured, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.core.domain import BASELINE, DType, Protocol, Scheme, TaskRef
from qbatch.core.errors import CudaOom
from qbatch.core.measured.measurement import Measurement
from qbatch.scheduler.lm_eval_files import read_tasks
from qbatch.worker.measuring import model_benchmark
from qbatch.worker.measuring.model_benchmark import ModelBenchmark
from qbatch.worker.measuring.quality import lm_eval_tasks
from tests import quiz, tiny
from tests.benchmarking import benchmark
from tests.unit.benchmark_models import INT8, NF4, QUICK, TEXT, loaded_on_cpu, quantized

ACCURACY_AND_MARGINS = [{"metric": "acc"}, {"metric": "brier_score"}]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quiz.make_taught(tmp_path_factory.mktemp("taught"))


def by_file(path: Path, **fields: Any) -> tuple[Protocol, dict[str, str]]:
    read = read_tasks([str(path)])
    return replace(QUICK, tasks=read.refs, **fields), dict(read.texts)


def by_name(*names: str) -> tuple[Protocol, dict[str, str]]:
    return replace(QUICK, tasks=tuple(TaskRef(name=name) for name in names)), {}


def measured(
    folder: Path,
    asked: tuple[Protocol, dict[str, str]],
    scheme: Scheme = BASELINE,
    on_step: Callable[[str], None] = lambda _step: None,
) -> Measurement:
    protocol, texts = asked
    return benchmark(
        loaded_on_cpu(folder),
        folder=folder,
        scheme=scheme.resolved(DType.BFLOAT16),
        dtype=DType.BFLOAT16,
        protocol=protocol,
        eval_text=TEXT,
        on_step=on_step,
        task_texts=texts,
    )


def refused(folder: Path, asked: tuple[Protocol, dict[str, str]], match: str, *, may_pass: bool | None = None) -> None:
    """No task is run, the row says why, and everything else is measured. ``may_pass``: whether another worker may."""
    steps: list[str] = []
    measurement = measured(folder, asked, on_step=steps.append)
    assert "tasks" not in steps
    assert measurement.details.tasks is None
    assert re.search(match, measurement.details.tasks_reason or "")
    assert measurement.details.incomplete is may_pass
    assert measurement.perplexity is not None
    assert measurement.decode_tokens_per_s is not None


@pytest.mark.parametrize("scheme", [BASELINE, INT8, NF4], ids=lambda scheme: scheme.method.value)
def test_the_figures_are_those_of_the_log_likelihoods(taught: Path, tmp_path: Path, scheme: Scheme) -> None:
    folder = taught if scheme.is_baseline else quantized(taught, tmp_path / "checkpoint", scheme)
    path = quiz.write_quiz(tmp_path / "quiz", metric_list=ACCURACY_AND_MARGINS)
    measurement = measured(folder, by_file(path), scheme)
    figures = measurement.details.to_json()["tasks"]["quiz"]
    scores = quiz.log_likelihoods(folder)
    assert (measurement.answers or {})["quiz"].values == {"acc": tuple(map(float, quiz.right_answers(scores)))}
    assert figures["acc"] == quiz.accuracy(scores) == quiz.TAUGHT_ACCURACY
    # LLM.int8 looks for outliers in a whole batch: eight together are not quite eight apart.
    assert figures["brier_score"] == pytest.approx(quiz.brier_score(scores), rel=0.02)
    n = len(quiz.QUESTIONS)
    assert figures["acc_stderr"] == pytest.approx((0.75 * 0.25 / (n - 1)) ** 0.5)
    assert figures["brier_score_stderr"] is None
    assert (figures["n_samples"], figures["num_fewshot"], figures["version"]) == (n, 0, "2")
    assert figures["higher_is_better"] == {"acc": True, "brier_score": False}


def test_a_model_that_was_not_taught_guesses(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path / "llama", seed=3)
    path = quiz.write_quiz(tmp_path / "quiz", metric_list=ACCURACY_AND_MARGINS)
    figures = measured(folder, by_file(path)).details.to_json()["tasks"]["quiz"]
    scores = quiz.log_likelihoods(folder)
    assert figures["acc"] == quiz.accuracy(scores) < quiz.TAUGHT_ACCURACY
    assert figures["brier_score"] == pytest.approx(quiz.brier_score(scores), rel=0.02)


def test_the_same_questions_give_the_same_figures_again(taught: Path, tmp_path: Path) -> None:
    asked = by_file(quiz.write_quiz(tmp_path, fewshot_split="test"), num_fewshot=2)
    first, second = (measured(taught, asked).details.to_json()["tasks"] for _ in range(2))
    assert first == second
    assert first["quiz"]["num_fewshot"] == 2


def test_tasks_that_ran_out_of_memory_are_run_again_as_before(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where other models, which are unloaded then, took the memory."""
    asked, original = by_file(quiz.write_quiz(tmp_path, fewshot_split="test"), num_fewshot=2), lm_eval_tasks.run_tasks
    expected = measured(taught, asked).details.tasks

    def runs_out(*arguments: Any) -> None:
        original(*arguments)
        raise CudaOom("CUDA out of memory")

    measure = ModelBenchmark.measure_quality

    def measure_twice(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(model_benchmark, "run_tasks", runs_out)
            with pytest.raises(CudaOom):
                measure(*arguments)
        measure(*arguments)

    monkeypatch.setattr(ModelBenchmark, "measure_quality", measure_twice)
    assert expected is not None
    assert measured(taught, asked).details.tasks == expected


def test_a_limit_asks_the_first_questions(taught: Path, tmp_path: Path) -> None:
    path = quiz.write_quiz(tmp_path)
    whole, limited = (
        measured(taught, by_file(path, **fields)).details.to_json()["tasks"]["quiz"]
        for fields in ({}, {"task_limit": 4})
    )
    # Of the first four, the first is taught wrong, and so is none of the others.
    assert (limited["n_samples"], limited["acc"]) == (4, 0.75)
    assert limited["config_hash"] == whole["config_hash"]
    assert limited["samples_hash"] != whole["samples_hash"]


def test_generated_answers_and_perplexity_are_tasks_too(taught: Path, tmp_path: Path) -> None:
    common = {"doc_to_choice": None, "metric_list": None}
    generated = quiz.write_quiz(
        tmp_path / "a",
        **common | {"metric_list": [{"metric": "exact_match"}]},
        task="written",
        output_type="generate_until",
        doc_to_target="{{choices[answer]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        filter_list=[{"name": "word", "filter": [{"function": "regex", "regex_pattern": f"({'|'.join(quiz.WORDS)})"},
                                                 {"function": "take_first"}]}],
    )  # fmt: skip
    rolling = quiz.write_quiz(
        tmp_path / "b", **common, task="read", output_type="loglikelihood_rolling", doc_to_target="{{question}}"
    )
    read = read_tasks([str(generated), str(rolling)])
    tasks = measured(taught, (replace(QUICK, tasks=read.refs), dict(read.texts))).details.to_json()["tasks"]
    # No end token was taught: the filter takes the first word that is an answer.
    assert tasks["written"]["exact_match,word"] == quiz.TAUGHT_ACCURACY
    assert tasks["written"]["exact_match,word_stderr"] > 0
    assert tasks["read"]["word_perplexity"] > 1
    assert json.loads(json.dumps(tasks)) == tasks


def test_what_is_analyzed_of_decoding_has_its_reason_where_nothing_decodes(tmp_path: Path) -> None:
    asked = replace(QUICK, why=True, energy=True)
    found = measured(tiny.make_encoder(tmp_path / "bert", "masked-lm"), (asked, {})).details.not_measured or {}
    said = "only the decoding of causal language models is analyzed"
    assert (found["why"], found["energy"]) == (said, said)


def test_an_encoder_is_measured_without_them(tmp_path: Path) -> None:
    folder = tiny.make_encoder(tmp_path / "bert", "masked-lm")
    details = measured(folder, by_file(quiz.write_quiz(tmp_path / "quiz"))).details.to_json()
    assert details["tasks"] is None
    assert "generates text" in details["tasks_reason"]
    assert "incomplete" not in details
    assert details["stats"]["forward"]["count"] > 0


def test_an_encoder_decoder_answers(tmp_path: Path) -> None:
    folder = tiny.make_seq2seq(tmp_path / "t5")
    figures = measured(folder, by_file(quiz.write_quiz(tmp_path / "quiz"))).details.to_json()["tasks"]["quiz"]
    assert 0 <= figures["acc"] <= 1


def test_without_tasks_nothing_of_the_harness_is_there(taught: Path) -> None:
    details = measured(taught, (QUICK, {})).details.to_json()
    assert details["tasks"] is None
    assert details["tasks_reason"] is None


def test_a_head_of_its_own_is_left_apart(taught: Path, tmp_path: Path) -> None:
    # The configuration says that they are one, the file has two that differ, and transformers keeps both.
    folder = tmp_path / "own-head"
    tiny.make_causal(folder, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = quiz.write_quiz(tmp_path / "quiz", metric_list=ACCURACY_AND_MARGINS)
    figures = measured(folder, by_file(path)).details.to_json()["tasks"]["quiz"]
    assert figures["brier_score"] == pytest.approx(quiz.brier_score(quiz.log_likelihoods(folder)), rel=0.02)


@pytest.mark.parametrize(
    "template",
    ["{{ question.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.getcwd() }}"],
)
def test_a_template_reaches_nothing_but_its_data(taught: Path, tmp_path: Path, template: str) -> None:
    path = quiz.write_quiz(tmp_path, doc_to_text=template)
    refused(taught, by_file(path), "accesses more than its data")


def test_a_metric_that_the_harness_does_not_have_is_refused(taught: Path, tmp_path: Path) -> None:
    path = quiz.write_quiz(tmp_path, metric_list=[{"metric": "rouge"}])
    refused(taught, by_file(path), "a script from the hub")


def test_a_task_whose_template_fails_says_why(taught: Path, tmp_path: Path) -> None:
    path = quiz.write_quiz(tmp_path, doc_to_text="{{ querstion }}")
    refused(taught, by_file(path), "'querstion' is undefined")


def test_a_worker_without_the_harness_says_so(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(taught, by_file(quiz.write_quiz(tmp_path)), r"pip install 'qbatch\[eval\]'", may_pass=True)


@pytest.mark.parametrize(
    ("name", "match", "may_pass"),
    [
        ("no_such_task", "has no task 'no_such_task'", True),
        ("humaneval", "runs code that the model writes", None),
        ("kobest_boolq", "script from the hub", None),
        ("xnli_va", "comes with code", None),
        # A group, for one of its tasks.
        ("catalan_bench", "comes with code", None),
        # Not downloaded here, and said in one line.
        ("arc_easy", "cannot load the tasks", True),
    ],
)
def test_a_name_is_looked_up_in_the_harnesss_registry(
    taught: Path, name: str, match: str, may_pass: bool | None
) -> None:
    refused(taught, by_name(name), match, may_pass=may_pass)

"""Quality on several texts: each has the figures that it would have alone, and speed is measured with the first."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qbatch.core.domain import (
    BASELINE,
    DeviceKind,
    Method,
    Protocol,
    ProtocolOptions,
    Scheme,
    TextRef,
)
from qbatch.core.errors import BenchmarkError, FetchError, UnsafeSource, Unsupported
from qbatch.core.measured.details import Details
from qbatch.worker.measuring import EVAL_TEXTS, model_benchmark
from tests.bundles import TEXT_HASH, Ear, run_bundle
from tests.tiny import make_causal
from tests.unit.benchmark_models import QUICK

SCHEMES = {1: BASELINE, 2: Scheme(method=Method.NF4)}
CODE = EVAL_TEXTS["code"].read_text(encoding="utf-8")
CODE_REF = TextRef(name="code", sha256=hashlib.sha256(CODE.encode()).hexdigest())


@pytest.fixture(autouse=True)
def a_quick_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(QUICK, eval_text_sha256=options.eval_text_sha256, more_texts=options.more_texts or ())

    monkeypatch.setattr(ProtocolOptions, "for_device", quick)


def measured(source: Path, text_sha256: str, *more: TextRef, attempt: int = 1, of: tuple[int, ...] = (1, 2)) -> Ear:
    options = ProtocolOptions(eval_text_sha256=text_sha256, more_texts=more or None)
    schemes = {job_id: SCHEMES[job_id] for job_id in of}
    return run_bundle(source, schemes, attempt=attempt, protocol=options, texts={CODE_REF.sha256: CODE})


def details(ear: Ear, job_id: int) -> Details:
    return ear.measurements()[job_id].details


def test_each_text_has_the_figures_that_it_has_alone(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "llama", dtype="bfloat16")
    both = measured(source, TEXT_HASH, CODE_REF)
    alone = measured(source, CODE_REF.sha256, attempt=2)
    (name,) = details(both, 2).more_texts or {}
    assert name == "code"
    for job_id in (1, 2):
        code = (details(both, job_id).more_texts or {})["code"]
        assert code.quality == details(alone, job_id).quality
        assert code.perplexity == details(alone, job_id).perplexity
        assert code.perplexity.mean_nll != details(both, job_id).perplexity.mean_nll
    assert (details(both, 2).more_texts or {})["code"].quality.kl_mean != details(both, 2).quality.kl_mean


def test_without_a_tokenizer_each_text_says_so(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "llama", dtype="bfloat16")
    for file in source.glob("*token*"):
        file.unlink()
    found = details(measured(source, TEXT_HASH, CODE_REF), 2)
    assert found.quality.reason is not None
    assert (found.more_texts or {})["code"].quality.reason == found.quality.reason


@pytest.mark.parametrize(
    ("when", "error", "reason"),
    [
        ("load_tasks", Unsupported("no such task"), "no such task"),
        ("load_tasks", ImportError("no jinja2"), "cannot load the tasks: ImportError: no jinja2"),
        ("run_tasks", BenchmarkError("no question is left"), "no question is left"),
        ("run_tasks", UnsafeSource("a template looks around"), "a template looks around"),
        ("run_tasks", KeyError("acc"), "cannot run the tasks: KeyError: 'acc'"),
    ],
    ids=["not known", "not importable", "without questions", "unsafe", "unforeseen"],
)
def test_tasks_that_fail_leave_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, error: Exception, reason: str
) -> None:
    """Of the baseline too."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(model_benchmark, when, fail)
    ear = measured(make_causal(tmp_path / "llama", dtype="bfloat16"), TEXT_HASH, CODE_REF)
    assert ear.failed() == {}
    for job_id, row in ear.measurements().items():
        assert (row.details.tasks, row.details.tasks_reason, row.details.not_measured) == (None, reason, None)
        assert row.perplexity is not None
        assert row.decode_tokens_per_s is not None
        assert (row.details.more_texts or {})["code"].perplexity.mean_nll is not None
        assert (row.kl_mean is None) is (job_id == 1)


@pytest.mark.parametrize("when", ["load_tasks", "run_tasks"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device_error"),
        (MemoryError(), "host_oom"),
        (FetchError("the hub does not answer"), "fetch_error"),
    ],
    ids=["device", "memory", "hub"],
)
def test_what_befell_the_machine_is_no_failure_of_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, error: Exception, kind: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(model_benchmark, when, fail)
    assert measured(make_causal(tmp_path / "llama", dtype="bfloat16"), TEXT_HASH, of=(1,)).failed() == {1: kind}


def test_a_text_on_which_the_baseline_was_not_measured_says_so(tmp_path: Path) -> None:
    source = make_causal(tmp_path / "llama", dtype="bfloat16")
    measured(source, TEXT_HASH, of=(1,))
    found = details(measured(source, TEXT_HASH, CODE_REF, attempt=2, of=(2,)), 2)
    assert found.quality.kl_mean is not None
    code = (found.more_texts or {})["code"]
    assert code.quality.kl_mean is None
    assert "the outputs of its baseline are not stored" in (code.quality.reason or "")
    assert code.perplexity.mean_nll is not None

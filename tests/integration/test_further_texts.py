"""Quality on several texts: each has the figures that it would have alone, and speed is measured with the first."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

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
from qbatch.worker.measuring.quality.perplexity import Window
from qbatch.worker.models.load import LoadedModel
from tests.bundles import TEXT_HASH, Ear, run_bundle
from tests.tiny import make_causal
from tests.unit.benchmark_models import QUICK, TEXT

SCHEMES = {1: BASELINE, 2: Scheme(method=Method.NF4)}
CODE = EVAL_TEXTS["code"].read_text(encoding="utf-8")
CODE_REF = TextRef(name="code", sha256=hashlib.sha256(CODE.encode()).hexdigest())
# Its prompts, from the beginning, are readable.
LATER = f"{TEXT[:100]} __future__ {TEXT[100:]}"
LATER_SHA256 = hashlib.sha256(LATER.encode()).hexdigest()


@pytest.fixture(autouse=True)
def a_quick_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(options: ProtocolOptions, _kind: DeviceKind) -> Protocol:
        return replace(
            QUICK,
            eval_text_sha256=options.eval_text_sha256,
            more_texts=options.more_texts or (),
            speed=options.speed is not False,
        )

    monkeypatch.setattr(ProtocolOptions, "for_device", quick)


def measured(
    source: Path,
    text_sha256: str,
    *more: TextRef,
    attempt: int = 1,
    of: tuple[int, ...] = (1, 2),
    speed: bool | None = None,
) -> Ear:
    options = ProtocolOptions(eval_text_sha256=text_sha256, more_texts=more or None, speed=speed)
    schemes = {job_id: SCHEMES[job_id] for job_id in of}
    texts = {CODE_REF.sha256: CODE, LATER_SHA256: LATER}
    return run_bundle(source, schemes, attempt=attempt, protocol=options, texts=texts)


def knows_no_future(folder: Path) -> Path:
    """A model whose tokenizer has a token that it has not: any text with ``__future__`` is unreadable."""
    make_causal(folder, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["__future__"])
    tokenizer.save_pretrained(folder)
    return folder


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


def test_a_further_text_that_is_not_readable_leaves_the_first(tmp_path: Path) -> None:
    ear = measured(knows_no_future(tmp_path / "llama"), TEXT_HASH, CODE_REF)
    assert ear.failed() == {}
    for job_id, row in ear.measurements().items():
        assert row.perplexity is not None
        assert row.decode_tokens_per_s is not None
        assert row.details.not_measured is None
        assert (row.kl_mean is None) is (job_id == 1)
        code = (row.details.more_texts or {})["code"]
        assert (code.perplexity.reason or "").startswith("the text code cannot be scored: the tokenizer yields id")
        assert (code.quality.reason is None) is (job_id == 1)


@pytest.mark.parametrize("speed", [True, False])
def test_a_first_text_that_is_not_readable_leaves_the_others(tmp_path: Path, speed: bool) -> None:
    """A baseline of which nothing else is asked fails: its tokenizer is another model's."""
    prose = TextRef(name="prose", sha256=TEXT_HASH)
    ear = measured(knows_no_future(tmp_path / "llama"), LATER_SHA256, prose, speed=speed)
    assert ear.failed() == ({} if speed else {1: "benchmark_error"})
    assert ear.measurements().keys() == ({1, 2} if speed else {2})
    for row in ear.measurements().values():
        assert (row.decode_tokens_per_s is not None) is speed
        assert (row.perplexity, row.details.not_measured) == (None, None)
        assert (row.details.perplexity.reason or "").startswith("the tokenizer yields id")
        assert (row.details.more_texts or {})["prose"].perplexity.mean_nll is not None


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (IndexError("index out of range in self"), {}),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), {1: "device_error"}),
        (MemoryError(), {1: "host_oom"}),
    ],
    ids=["model", "device", "memory"],
)
def test_a_model_that_fails_on_a_further_text_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, failed: dict[int, str]
) -> None:
    failing_on(CODE, error, monkeypatch)
    ear = measured(make_causal(tmp_path / "llama", dtype="bfloat16"), TEXT_HASH, CODE_REF, of=(1,))
    assert ear.failed() == failed
    for row in ear.measurements().values():
        assert row.perplexity is not None
        assert (row.details.more_texts or {})["code"].perplexity.reason == (
            "the text code cannot be scored: the model fails on it: IndexError: index out of range in self"
        )


def test_a_baseline_that_fails_on_its_first_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_on(TEXT, IndexError("index out of range in self"), monkeypatch)
    ear = measured(make_causal(tmp_path / "llama", dtype="bfloat16"), TEXT_HASH, CODE_REF, of=(1,))
    assert ear.failed() == {1: "benchmark_error"}


def failing_on(text: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model_benchmark.text_windows

    def text_windows(loaded: LoadedModel, protocol: Protocol, read: str) -> list[Window]:
        if read == text:
            raise error
        return original(loaded, protocol, read)

    monkeypatch.setattr(model_benchmark, "text_windows", text_windows)


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

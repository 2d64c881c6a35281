"""Adapters that are trained: they win back more, the same from the same seed, and go on after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from qbatch.core.adapter_names import ADAPTER_WEIGHTS
from qbatch.core.domain import DType
from qbatch.core.errors import Unsupported, UsageError
from qbatch.core.recovery import Recovery, RecoveryKind
from qbatch.worker.files.training_state import KeptState, TrainingState
from qbatch.worker.measuring.quality.divergence import divergence
from qbatch.worker.measuring.quality.probes import probes_of
from qbatch.worker.measuring.quality.replay import logits_of
from qbatch.worker.models.load import load
from qbatch.worker.recovering.distillation import recover_by_training
from qbatch.worker.recovering.svd_recovery import RecoveryWork, recover_by_factors
from tests import tiny
from tests.unit.test_adapters import quantized
from tests.unit.test_sensitivity import windows

pytestmark = pytest.mark.slow

TEXT, OTHER_TEXT = ("\n".join([*topics.values()][begin : begin + 10]) for begin in (60, 70))


def a_recovery(steps: int) -> Recovery:
    return replace(Recovery.of(RecoveryKind.QLORA, 4, "0" * 64, steps), window=48, windows=8)


def trained(
    work: RecoveryWork, folder: Path, kept: Path, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    return recover_by_training(work, folder, KeptState(folder=kept), report, kept_every_s=0.0)


@pytest.fixture(scope="module")
def base(trained_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(trained_source, tmp_path_factory.mktemp("distilled") / "nf4")


@pytest.fixture
def work(trained_source: Path, base: Path) -> RecoveryWork:
    return RecoveryWork(
        source=trained_source, base=base, recovery=a_recovery(12), dtype=DType.FLOAT32, device="cpu", text=TEXT
    )


def kl(work: RecoveryWork, adapter: Path | None) -> float:
    """On a text that nothing was trained on."""
    exact = load(work.source, dtype=DType.FLOAT32, device="cpu")
    adapted = load(work.base, dtype=DType.FLOAT32, device="cpu", adapter=adapter)
    return sum(
        float(divergence(logits_of(exact.model, probe, "cpu"), logits_of(adapted.model, probe, "cpu")).kl.sum())
        for probe in probes_of(exact, windows(4, 64), OTHER_TEXT)
    )


def test_training_leaves_less_than_the_factors_that_it_begins_with(work: RecoveryWork, tmp_path: Path) -> None:
    (tmp_path / "factors").mkdir()
    recover_by_factors(work, tmp_path / "factors", lambda _: None)
    steps: list[str] = []
    audit = trained(work, tmp_path / "trained", tmp_path / "kept", steps.append)
    before, after = kl(work, tmp_path / "factors"), kl(work, tmp_path / "trained")
    assert after < before < kl(work, None)
    assert audit["training"] == {
        "steps": 12,
        "optimizer": "PagedAdamW8bit, not paged: a CPU has no such memory",
        "first_kl": pytest.approx(audit["training"]["first_kl"]),
        "last_kl": pytest.approx(audit["training"]["last_kl"]),
    }
    assert audit["training"]["last_kl"] < audit["training"]["first_kl"]
    assert any(step.startswith("recovering, step 12 of 12, KL ") for step in steps)


def test_the_first_step_is_reported_and_then_one_in_twenty(work: RecoveryWork, tmp_path: Path) -> None:
    steps: list[str] = []
    long = replace(work, recovery=replace(work.recovery, steps=41))
    trained(long, tmp_path / "trained", tmp_path / "kept", steps.append)
    told = [int(step.split()[2]) for step in steps if step.startswith("recovering, step")]
    assert told == [1, *range(2, 42, 2)]


def _trained_until_killed(work: RecoveryWork, folder: Path, kept: Path) -> None:
    def die(step: str) -> None:
        if step.startswith("recovering, step 7 "):
            os.kill(os.getpid(), signal.SIGKILL)

    trained(work, folder, kept, die)


def test_a_killed_training_goes_on_to_the_same_bytes(work: RecoveryWork, tmp_path: Path) -> None:
    without_kill = trained(work, tmp_path / "whole", tmp_path / "one")
    # Not a fork: torch refuses a backward pass in one where its threads for that have started.
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_trained_until_killed, args=(work, tmp_path / "killed", tmp_path / "other"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    state = KeptState(folder=tmp_path / "other").read()
    assert state is not None
    assert state.steps == 6
    heard: list[str] = []
    audit = trained(work, tmp_path / "killed", tmp_path / "other", heard.append)
    assert heard[0] == "recovering, going on after step 6", "the first factors are not computed again"
    assert audit["training"] == without_kill["training"] | {"resumed_after_step": 6}
    whole, resumed = ((tmp_path / name / ADAPTER_WEIGHTS).read_bytes() for name in ("whole", "killed"))
    assert resumed == whole


def test_a_state_that_cannot_be_read_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptState(folder=tmp_path / "kept")
    assert kept.read() is None
    kept.write(
        TrainingState(steps=3, first_kl=0.5, last_kl=0.25, factors={"a": torch.ones(2)}, optimizer={"state": {}})
    )
    read = kept.read()
    assert read is not None
    assert (read.steps, read.factors["a"].tolist()) == (3, [1.0, 1.0])
    assert (read.first_kl, read.last_kl) == (0.5, 0.25)
    path = kept.folder / "state.pt"
    path.write_bytes(path.read_bytes()[:100])
    assert kept.read() is None
    assert "the training begins anew" in caplog.text
    kept.remove()
    assert not kept.folder.exists()
    kept.remove()


def test_a_state_that_would_run_code_is_begun_anew(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "kept").mkdir()
    torch.save({"steps": Hostile(), "factors": {}, "optimizer": {}}, tmp_path / "kept" / "state.pt")
    assert KeptState(folder=tmp_path / "kept").read() is None
    assert not (tmp_path / "ran").exists()


def test_what_does_not_continue_a_text_is_not_trained(tmp_path: Path) -> None:
    source = tiny.make_seq2seq(tmp_path / "t5")
    work = RecoveryWork(
        source=source,
        base=quantized(source, tmp_path / "base"),
        recovery=a_recovery(1),
        dtype=DType.FLOAT32,
        device="cpu",
        text=TEXT,
    )
    with pytest.raises(Unsupported, match="continue a text, which T5ForConditionalGeneration does not"):
        trained(work, tmp_path / "adapter", tmp_path / "kept")


def test_a_text_without_a_whole_window_is_refused(work: RecoveryWork, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"the recovery text has \d+ tokens, and a window of the training has 48"):
        trained(replace(work, text="Too short."), tmp_path / "adapter", tmp_path / "kept")


def test_a_training_needs_steps() -> None:
    with pytest.raises(UsageError, match="qlora is trained, and needs at least one step"):
        Recovery.of(RecoveryKind.QLORA, 4, "0" * 64)
    assert Recovery.of(RecoveryKind.QLORA, 4, "0" * 64, 100).slug == "qlora-r4-s100"

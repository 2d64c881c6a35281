"""Perplexity against an independent computation in float64, and the windows it is taken over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbatch.core.domain import DType
from qbatch.worker.measuring.quality.perplexity import (
    WindowScores,
    score_text,
    text_windows,
    token_nll,
    windows,
)
from qbatch.worker.measuring.quality.reference import prepare_reference
from qbatch.worker.models.load import LoadedModel
from tests import tiny
from tests.unit.benchmark_models import QUICK, TEXT, loaded_on_cpu, make_capped


def numpy_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    highest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return log_sum - logits[np.arange(len(targets)), targets]


def reference_perplexity(loaded: object, ids: list[int], *, window: int, stride: int, count: int, bos: bool) -> float:
    """Strided windows the long way round: every window's full logits, then each token at the first place it fits."""
    model = loaded.model  # type: ignore[attr-defined]
    scored: dict[int, float] = {}
    for begin in range(0, count * stride, stride):
        piece = ids[begin : begin + window - bos]
        read = [tiny.BOS, *piece] if bos else piece
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0].double().numpy()
        losses = numpy_nll(logits[:-1], np.array(read[1:]))
        for place, loss in enumerate(losses, start=begin + (not bos)):
            scored.setdefault(place, float(loss))
    return float(np.exp(np.mean(list(scored.values()))))


@pytest.mark.parametrize(("arch", "bos"), [("llama", True), ("bloom", False)])
@pytest.mark.parametrize("stride", [64, 20])
def test_perplexity_is_that_of_a_float64_computation_from_full_logits(
    tmp_path: Path, arch: str, bos: bool, stride: int
) -> None:
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path, arch), DType.FLOAT32)
    protocol = replace(QUICK, eval_window=64, eval_stride=stride, eval_max_windows=3)
    score = score_text(loaded, text_windows(loaded, protocol, TEXT), lambda _: None)
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = reference_perplexity(loaded, ids, window=64, stride=min(stride, 64 - bos), count=3, bos=bos)
    assert score is not None
    assert score.perplexity == pytest.approx(expected, rel=1e-6)


def test_a_text_shorter_than_one_window_has_a_perplexity(tmp_path: Path) -> None:
    loaded = loaded_on_cpu(tiny.make_causal(tmp_path, "bloom"), DType.FLOAT32)
    ids = loaded.tokenizer("two lines of text", add_special_tokens=False)["input_ids"]
    score = score_text(loaded, text_windows(loaded, QUICK, "two lines of text"), lambda _: None)
    assert score is not None
    assert score.tokens == len(ids) - 1
    expected = reference_perplexity(loaded, ids, window=64, stride=64, count=1, bos=False)
    assert score.perplexity == pytest.approx(expected, rel=1e-6)


def test_rows_are_scored_the_same_in_pieces_as_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 1000, generator=generator).mul_(8)
    targets = torch.randint(1000, (200,), generator=generator)
    expected = numpy_nll(logits.numpy(), targets.numpy())
    np.testing.assert_allclose(token_nll(logits, targets).numpy(), expected, rtol=1e-6)


@given(
    length=st.integers(0, 200),
    window=st.integers(2, 40),
    stride=st.integers(1, 60),
    bos=st.booleans(),
)
def test_no_token_is_scored_twice_and_with_bos_none_is_left_out(
    length: int, window: int, stride: int, bos: bool
) -> None:
    before = (1000,) if bos else ()
    ids = list(range(length))
    cut = list(windows(ids, before, window=window, stride=stride, max_windows=10_000))
    scored = [token for piece in cut for token in piece.ids[len(piece.ids) - piece.scored :]]
    assert all(len(piece.ids) <= window for piece in cut)
    assert all(piece.scored < len(piece.ids) for piece in cut)
    assert scored == sorted(set(scored))
    if bos:
        assert scored == ids


def test_as_many_windows_as_asked_for_and_no_more() -> None:
    assert len(list(windows(range(1000), (), window=10, stride=10, max_windows=7))) == 7


def scores_on_the_way(base: LoadedModel, folder: Path, **options: Any) -> WindowScores:
    scores = WindowScores()
    prepare_reference(
        base, QUICK, TEXT, folder, on_window=lambda n, _, probe, logits: scores.add(n, logits, probe.targets), **options
    )
    return scores


# Where the head does not give the logits again, all windows are computed a second time, for their logits.
@pytest.mark.parametrize("make", [tiny.make_causal, make_capped], ids=["hidden", "logits"])
def test_what_is_stored_of_a_base_scores_its_text_too(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    base = loaded_on_cpu(make(tmp_path / "base"))
    scores = scores_on_the_way(base, tmp_path / "reference")
    alone = score_text(base, text_windows(base, QUICK, TEXT), lambda _: None)
    assert alone is not None
    assert scores.whole(len(alone.window_nll)) == alone


def test_a_text_of_which_only_a_part_is_stored_is_not_scored_by_it(tmp_path: Path) -> None:
    base = loaded_on_cpu(tiny.make_causal(tmp_path / "llama"))
    scores = scores_on_the_way(base, tmp_path / "reference", max_bytes=20_000)
    assert scores.whole(QUICK.eval_max_windows) is None
    assert scores_on_the_way(base, tmp_path / "reference").whole(1) is None, "it is there already"

"""Perplexity of a causal language model over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.worker.measuring.stats import clustered_error
from qbatch.worker.measuring.tokens import affixes, text_cut, text_ids
from qbatch.worker.models.load import LoadedModel

# Rows of logits turned to float32 at once: 64 rows of a 250,880-word vocabulary are 61 MiB.
_ROWS_AT_ONCE = 64
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """``ids`` is what the model reads; of them the last ``scored`` are predicted and count."""

    ids: tuple[int, ...]
    scored: int


def exponential(exponent: float) -> float:
    """e to the power of ``exponent``: infinity where a float ends, rather than an OverflowError."""
    return math.exp(exponent) if exponent < _LARGEST_EXPONENT else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """Negative log-likelihoods of a text in nats: per window the sum over its scored tokens, and their number."""

    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.window_tokens)

    @property
    def mean_nll(self) -> float:
        return math.fsum(self.window_nll) / self.tokens

    @property
    def perplexity(self) -> float:
        return exponential(self.mean_nll)

    @property
    def perplexity_se(self) -> float | None:
        """Its standard error, clustered by window; None for a single one."""
        error = clustered_error(self.window_nll, self.window_tokens)
        return None if error is None else self.perplexity * error


def windows(
    ids: Sequence[int], before: Sequence[int], *, window: int, stride: int, max_windows: int
) -> Iterator[Window]:
    """Cut ``ids`` into windows of at most ``window`` tokens, ``before`` (BOS or nothing) in front of each.

    Consecutive windows begin ``stride`` tokens apart, or at once where that would leave a gap. A token is scored in
    the first window that reaches it, but never at a window's very beginning: without BOS, nothing predicts it there.
    """
    room = window - len(before)
    stride = min(stride, room)
    done = 0
    for index in range(max_windows):
        begin = index * stride
        end = min(begin + room, len(ids))
        scored = end - max(done, begin if before else begin + 1)
        if scored < 1:
            return
        yield Window(ids=(*before, *ids[begin:end]), scored=scored)
        done = end


def text_windows(loaded: LoadedModel, protocol: Protocol, text: str) -> list[Window]:
    """The windows of ``text`` that ``protocol`` asks for, clipped to the positions that the model has."""
    cut, before = text_cut(loaded, protocol), affixes(loaded.tokenizer).before
    ids = text_ids(loaded, text, cut.tokens)
    return list(windows(ids, before, window=cut.window, stride=cut.stride, max_windows=cut.count))


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln p(target) in nats, float32 [rows], of logits [rows, vocabulary] in any dtype."""
    pieces = zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(targets, _ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(rows.float(), to, reduction="none") for rows, to in pieces])


def score_text(loaded: LoadedModel, cut: Sequence[Window], on_window: Callable[[int], None]) -> TextScore | None:
    """Score ``cut``, windows of a text; None where there is nothing to score."""
    if not cut:
        return None
    nll = [_window_nll(loaded, window, on_window, number) for number, window in enumerate(cut, start=1)]
    return TextScore(window_nll=tuple(nll), window_tokens=tuple(window.scored for window in cut))


@torch.inference_mode()
def _window_nll(loaded: LoadedModel, window: Window, on_window: Callable[[int], None], number: int) -> float:
    on_window(number)
    ids = torch.tensor([window.ids], device=loaded.device)
    logits = window_logits(loaded.model, ids, window.scored)
    return float(token_nll(logits, ids[0, -window.scored :]).sum(dtype=torch.float64))


def window_logits(model: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """Logits [scored, vocabulary] that predict the last ``scored`` of ``ids`` [1, length]."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, -scored - 1 : -1]

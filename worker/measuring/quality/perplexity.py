"""Perplexity of a causal language model over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qbatch.core.domain import Protocol
from qbatch.core.exponential import exponential
from qbatch.core.statistics.clusters import clustered_error
from qbatch.worker.measuring.tokens import affixes, text_cut, text_ids
from qbatch.worker.models.load import LoadedModel

# Rows of logits converted to float32 at once: 64 rows of a vocabulary of 250,880 take 61 MiB.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """``ids``: the tokens that the model reads, of which the last ``scored`` are scored."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """Negative log-likelihoods of a text in nats: of each window the sum over its scored tokens, and their number."""

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
        """The standard error of the perplexity, clustered by window; None for a single window."""
        error = clustered_error(self.window_nll, self.window_tokens)
        return None if error is None else self.perplexity * error


class WindowScores:
    """Scores the windows of a text from logits that are computed for something else."""

    def __init__(self) -> None:
        self._windows: dict[int, tuple[float, int]] = {}

    def add(self, number: int, logits: torch.Tensor, targets: Sequence[int]) -> None:
        """Score the window of that ``number``, from 0, by its logits [rows, vocabulary] and the token of each row."""
        self._windows[number] = (_sum_nll(logits, torch.tensor(targets, device=logits.device)), len(targets))

    def whole(self, count: int) -> TextScore | None:
        """The score of the text, if all of its ``count`` windows were added."""
        if not count or self._windows.keys() != set(range(count)):
            return None
        nll, tokens = zip(*(self._windows[number] for number in range(count)), strict=True)
        return TextScore(window_nll=nll, window_tokens=tokens)


def windows(
    ids: Sequence[int], before: Sequence[int], *, window: int, stride: int, max_windows: int
) -> Iterator[Window]:
    """Yield windows of ``ids`` of at most ``window`` tokens, each starting with ``before`` (BOS or nothing).

    Consecutive windows begin ``stride`` tokens apart, or less if that would leave a gap. A token is scored in the first
    window that contains it, except as the first token of a window without BOS, where nothing precedes it.
    """
    text_tokens = window - len(before)
    stride = min(stride, text_tokens)
    scored_until = 0
    for index in range(max_windows):
        begin = index * stride
        end = min(begin + text_tokens, len(ids))
        scored = end - max(scored_until, begin if before else begin + 1)
        if scored < 1:
            return
        yield Window(ids=(*before, *ids[begin:end]), scored=scored)
        scored_until = end


def text_windows(loaded: LoadedModel, protocol: Protocol, text: str) -> list[Window]:
    """The windows of ``text`` for ``protocol``, no longer than the model's maximum length."""
    cut, before = text_cut(loaded, protocol), affixes(loaded.tokenizer).before
    ids = text_ids(loaded, text, cut.tokens)
    return list(windows(ids, before, window=cut.window, stride=cut.stride, max_windows=cut.count))


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-ln p(target) in nats, float32 [rows], from logits [rows, vocabulary] in any dtype."""
    pieces = zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(targets, _ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(rows.float(), to, reduction="none") for rows, to in pieces])


def score_text(loaded: LoadedModel, cut: Sequence[Window], on_window: Callable[[int], None]) -> TextScore | None:
    """Score the windows of a text; None if there are none."""
    if not cut:
        return None
    nll = [_window_nll(loaded, window, on_window, number) for number, window in enumerate(cut, start=1)]
    return TextScore(window_nll=tuple(nll), window_tokens=tuple(window.scored for window in cut))


@torch.inference_mode()
def _window_nll(loaded: LoadedModel, window: Window, on_window: Callable[[int], None], number: int) -> float:
    on_window(number)
    ids = torch.tensor([window.ids], device=loaded.device)
    logits = window_logits(loaded.model, ids, window.scored)
    return _sum_nll(logits, ids[0, -window.scored :])


def _sum_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return float(token_nll(logits, targets).sum(dtype=torch.float64))


def window_logits(model: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """Logits [scored, vocabulary] that predict the last ``scored`` of ``ids`` [1, length]."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, -scored - 1 : -1]

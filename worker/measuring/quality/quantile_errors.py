"""Standard errors of quantiles over windows of a text, by a bootstrap over whole windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

_RESAMPLES = 200
_SEED = 0


def quantile_errors(windows: Sequence[torch.Tensor], qs: Sequence[float]) -> list[float | None]:
    """Standard error of each quantile in ``qs`` over the rows of all ``windows``, float64 [rows] each, with a fixed
    seed. None for a single window.

    The last factor corrects for the bootstrap's too small variance with few windows.
    """
    count = len(windows)
    if count < 2:
        return [None] * len(qs)
    draws = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(_SEED)).numpy()
    # NumPy, because the first of torch's threads on the CPU took over a second to start beside a busy GPU.
    every = torch.cat(list(windows)).numpy()
    if np.isnan(every).any():
        return [math.nan] * len(qs)
    # A draw is not put together and sorted anew, which took seconds for a text: its rows are those of the sorted whole,
    # each as often as its window was drawn.
    order = every.argsort(kind="stable")
    values, window_of = every[order], np.repeat(np.arange(count), [len(rows) for rows in windows])[order]
    of_draws = [_quantiles(values, np.bincount(draw, minlength=count)[window_of], qs) for draw in draws]
    return [float(torch.stack(of_q).std()) * math.sqrt(count / (count - 1)) for of_q in zip(*of_draws, strict=True)]


def _quantiles(values: np.ndarray, repeats: np.ndarray, qs: Sequence[float]) -> torch.Tensor:
    """Quantiles [qs] of sorted ``values``, each of which counts ``repeats`` times, as ``torch.quantile`` gives them."""
    until = repeats.cumsum()
    ranks = np.array(qs) * float(until[-1] - 1)
    below = np.floor(ranks)
    low, high = (values[until.searchsorted(rank, side="right")] for rank in (below, np.ceil(ranks)))
    return torch.lerp(*map(torch.from_numpy, (low, high, ranks - below)))

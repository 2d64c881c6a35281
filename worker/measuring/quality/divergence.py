"""How far a model's predictions differ from its base's, for each token and summarized.

The figures are those of llama.cpp (``llama-perplexity --kl-divergence``, tools/perplexity/perplexity.cpp): KL
divergence from base to model, ln of the ratio of perplexities, agreement of the most probable token, and root mean
square of the change in the correct token's probability. All in nats (natural logarithms). Computed in float64, since a
KL of 1e-4 nats is the difference of terms a million times larger, in which float32 would cause an error of one per
cent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qbatch.core.exponential import exponential
from qbatch.core.measured.quality_figures import ConfidenceBucket, Quality
from qbatch.core.statistics.clusters import clustered_error
from qbatch.worker.measuring.quality.quantile_errors import quantile_errors

# Logits converted to float64 at once, of which several tensors coexist: 16 MiB each, which a CPU's cache may hold, and
# 64 MiB on a GPU, where fewer would take longer to launch than to compute.
_LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**23}
# The base's probability of its most probable token, between these.
_CONFIDENCES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_QUANTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Figures of each compared row of one window, float64 on the CPU. Without targets, the last three are empty.

    ``confidence``: the base's probability of its most probable token.
    """

    kl: torch.Tensor
    agrees: torch.Tensor
    confidence: torch.Tensor
    base_nll: torch.Tensor
    nll: torch.Tensor
    delta_p: torch.Tensor


def divergence(base_logits: torch.Tensor, logits: torch.Tensor, targets: Sequence[int] = ()) -> Divergence:
    """Compare ``logits`` with ``base_logits``, both [rows, vocabulary] in any dtype.

    ``targets``: the correct token id of each row, or none.
    """
    target_ids = torch.tensor(targets, dtype=torch.long, device=logits.device)
    at_once = max(1, _LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    begins = range(0, len(logits), at_once)
    pieces = [_rows(*(rows[begin : begin + at_once] for rows in (base_logits, logits, target_ids))) for begin in begins]
    columns = [torch.cat(column).cpu() for column in zip(*pieces, strict=True)]
    kl, agrees, confidence, base_nll, nll, delta_p = columns
    return Divergence(kl=kl, agrees=agrees, confidence=confidence, base_nll=base_nll, nll=nll, delta_p=delta_p)


def _rows(base_logits: torch.Tensor, logits: torch.Tensor, target_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    base, other = base_logits.double(), logits.double()
    base_total, other_total = base.logsumexp(-1), other.logsumexp(-1)
    # Of equal largest values, argmax returns the first.
    most_probable = base.argmax(-1)
    agrees = (most_probable == other.argmax(-1)).double()
    confidence = (base.gather(1, most_probable[:, None])[:, 0] - base_total).exp()
    p = (base - base_total[:, None]).exp_()
    # A token that the base considers impossible adds nothing: 0 · (-inf - x) counts as 0.
    difference = (base - other).masked_fill_(p == 0, 0.0)
    kl = torch.linalg.vecdot(p, difference) - (base_total - other_total)
    if not len(target_ids):
        return kl, agrees, confidence, kl[:0], kl[:0], kl[:0]
    base_log_p = base.gather(1, target_ids[:, None])[:, 0] - base_total
    log_p = other.gather(1, target_ids[:, None])[:, 0] - other_total
    return kl, agrees, confidence, -base_log_p, -log_p, log_p.exp() - base_log_p.exp()


def summarize_divergence(windows: Sequence[Divergence]) -> Quality:
    """Statistics over all rows of ``windows`` (at least one), each with a standard error clustered by window.

    Rows of one window share their context, so they are not independent; windows nearly are. For a single window, the
    standard errors are None.
    """
    kl, agrees = [window.kl for window in windows], [window.agrees for window in windows]
    every_kl = torch.cat(kl)
    errors = dict(zip(_QUANTILES, quantile_errors(kl, _QUANTILES), strict=True))
    summary = Quality(
        windows=len(windows),
        rows=len(every_kl),
        kl_mean=float(every_kl.mean()),
        kl_mean_se=_mean_error(kl),
        kl_median=_quantile(kl, 0.5),
        kl_median_se=errors[0.5],
        kl_p90=_quantile(kl, 0.9),
        kl_p90_se=errors[0.9],
        kl_p95=_quantile(kl, 0.95),
        kl_p95_se=errors[0.95],
        kl_p99=_quantile(kl, 0.99),
        kl_p99_se=errors[0.99],
        kl_max=float(every_kl.max()),
        window_kl=tuple(float(rows.sum()) for rows in kl),
        window_rows=tuple(len(rows) for rows in kl),
        kl_by_confidence=tuple(_bucket(windows, above, below) for above, below in itertools.pairwise(_CONFIDENCES)),
        top1_agreement=float(torch.cat(agrees).mean()),
        top1_agreement_se=_mean_error(agrees),
    )
    return _with_targets(summary, windows) if len(windows[0].nll) else summary


def _bucket(windows: Sequence[Divergence], above: float, below: float) -> ConfidenceBucket:
    """The KL of the rows of a certain confidence. Windows without any add nothing to the error."""
    is_within = [(w.confidence >= above) & ((w.confidence < below) | (below == 1)) for w in windows]
    kl = [rows for w, chosen in zip(windows, is_within, strict=True) if len(rows := w.kl[chosen])]
    return ConfidenceBucket(
        above=above,
        below=below,
        rows=sum(map(len, kl)),
        kl_mean=float(torch.cat(kl).mean()) if kl else None,
        kl_mean_se=_mean_error(kl) if kl else None,
    )


def _with_targets(summary: Quality, windows: Sequence[Divergence]) -> Quality:
    """``summary`` with the figures that need the correct token of each row."""
    base_nll, nll = [window.base_nll for window in windows], [window.nll for window in windows]
    ratios = [window.nll - window.base_nll for window in windows]
    base_perplexity, base_perplexity_se = _perplexity_with_error(base_nll)
    perplexity, perplexity_se = _perplexity_with_error(nll)
    rms_delta_p, rms_delta_p_se = _rms_with_error([window.delta_p for window in windows])
    return replace(
        summary,
        window_nll=tuple(float(rows.sum()) for rows in nll),
        window_tokens=tuple(len(rows) for rows in nll),
        base_perplexity=base_perplexity,
        base_perplexity_se=base_perplexity_se,
        perplexity=perplexity,
        perplexity_se=perplexity_se,
        ln_ppl_ratio=float(torch.cat(ratios).mean()),
        ln_ppl_ratio_se=_mean_error(ratios),
        rms_delta_p=rms_delta_p,
        rms_delta_p_se=rms_delta_p_se,
    )


def _perplexity_with_error(clusters: Sequence[torch.Tensor]) -> tuple[float, float | None]:
    """Perplexity and its standard error, which follows from that of the mean: d(exp m) = exp m · dm."""
    perplexity, error = exponential(float(torch.cat(list(clusters)).mean())), _mean_error(clusters)
    return perplexity, None if error is None else perplexity * error


def _rms_with_error(clusters: Sequence[torch.Tensor]) -> tuple[float, float | None]:
    """Root mean square and its standard error, which follows from that of the mean square: d√m = dm / 2√m."""
    squares = [rows.square() for rows in clusters]
    rms, error = math.sqrt(float(torch.cat(squares).mean())), _mean_error(squares)
    return rms, error / (2 * rms) if error is not None and rms > 0 else error


def _quantile(clusters: Sequence[torch.Tensor], q: float) -> float:
    return float(torch.quantile(torch.cat(list(clusters)), q))


def _mean_error(clusters: Sequence[torch.Tensor]) -> float | None:
    return clustered_error([float(rows.sum()) for rows in clusters], [len(rows) for rows in clusters])

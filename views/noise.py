"""Which differences are noise: under their standard error, or under what 16-bit arithmetic does by itself.

A standard error here is one standard error of the difference. Where none is known, nothing is called noise.
"""

from __future__ import annotations

import math
import statistics

from qbatch.views.figures import Row, dig

_PHASES = {
    "decode_tokens_per_s": "decode",
    "prefill_s_p50": "prefill",
    "per_token_s_p50": "per_token",
    "forward_s_p50": "forward",
    "forward_samples_per_s": "forward",
}
NOT_DISTINGUISHABLE = "not distinguishable"
NOISE_MARK = "≈"


def is_noise(key: str, row: Row, baseline: Row | None = None) -> bool:
    """Whether ``row``'s figure under ``key`` cannot be told from its baseline's.

    Quality is judged by the row's own comparison with its base; speed needs the baseline's row.
    """
    if key == "kl_mean":
        return _is_under(dig(row, "kl_mean"), quality(row, "kl_mean_se"), quality(row, "floor.kl_mean"))
    if key == "top1_agreement":
        agreement, floor = dig(row, "top1_agreement"), quality(row, "floor.top1_agreement")
        error = None if agreement is None else 1 - agreement
        return _is_under(error, quality(row, "top1_agreement_se"), None if floor is None else 1 - floor)
    if key == "perplexity":
        return _is_under(
            quality(row, "ln_ppl_ratio"), quality(row, "ln_ppl_ratio_se"), quality(row, "floor.ln_ppl_ratio")
        )
    if key == "details.quality.rank_correlation":
        correlation, floor = quality(row, "rank_correlation"), quality(row, "floor.rank_correlation")
        # No error of it is known: only what 16 bits do by themselves can be told.
        return correlation is not None and (correlation == 1 or (floor is not None and correlation >= floor))
    return key in _PHASES and baseline is not None and same_speed(key, row, baseline)


def quality(row: Row, name: str) -> float | None:
    found = dig(row, f"details.quality.{name}")
    return float(found) if isinstance(found, int | float) else None


def _is_under(difference: float | None, error: float | None, floor: float | None) -> bool:
    if difference is None:
        return False
    # No difference at all is no difference, whatever is known of its error.
    return difference == 0 or abs(difference) < (error or 0.0) or abs(difference) <= abs(floor or 0.0)


def same_speed(key: str, first: Row, second: Row) -> bool:
    """Whether two rows' times or rates under ``key`` differ by less than the standard error of the difference; a
    median is given its mean's."""
    one, other = dig(first, key), dig(second, key)
    if one is None or other is None:
        return False
    errors = relative_error(first, key), relative_error(second, key)
    if errors[0] is None or errors[1] is None:
        return bool(one == other)
    return bool(abs(one - other) < math.hypot(one * errors[0], other * errors[1]))


def relative_error(row: Row, key: str) -> float | None:
    """The standard error of the mean, over the mean, of the phase that ``key`` is a figure of: by all its times, or by
    the means of its rounds where those lie further apart. None for one value."""
    phase = dig(row, f"details.stats.{_PHASES[key]}") or {}
    count, mean, stdev = (phase.get(name) for name in ("count", "mean", "stdev"))
    if not count or count < 2 or not mean or stdev is None:
        return None
    return max(float(stdev / mean / math.sqrt(count)), _between_rounds(row, key))


def _between_rounds(row: Row, key: str) -> float:
    """A host that is slow for a round is slow for all its times: they are fewer measurements than they look."""
    means = dig(row, f"details.rounds.phases.{_PHASES[key]}.mean") or ()
    if len(means) < 2:
        return 0.0
    return float(statistics.stdev(means) / statistics.fmean(means) / math.sqrt(len(means)))

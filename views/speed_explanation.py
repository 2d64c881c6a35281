"""Explain decoding speed in sentences, from ``details.why`` (see docs/measurements.md) alone."""

from __future__ import annotations

from collections.abc import Iterable

from qbatch.core.measured.decode_figures import Verdict
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.metrics import DECODE
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import describe_row
from qbatch.views.formats import NOTHING
from qbatch.views.noise import NOT_DISTINGUISHABLE, noise_mark, same_speed
from qbatch.views.scheme import show_scheme
from qbatch.views.units import show_bytes, show_float, show_rate, show_ratio, show_seconds

_WAITING = (Verdict.HOST_BOUND, Verdict.SYNCHRONIZATION_BOUND)


def explain_speed(row: ResultRow, baseline: ResultRow | None) -> list[str]:
    """Sentences that explain a measured row's decoding speed. Empty for a model that does not decode.

    ``baseline`` must be of the same protocol and device, else None.
    """
    if row.decode_tokens_per_s is None:
        return []
    return [*_origin(row), *_explained(row, baseline)]


def _origin(row: ResultRow) -> Iterable[str]:
    if row.speed_from is not None:
        yield f"What follows was measured with {row.speed_from}, a model of the same shape."


def _explained(row: ResultRow, baseline: ResultRow | None) -> list[str]:
    if row.decode_tokens_per_s is None:
        return []
    if row.details.is_on_cpu:
        return [*_on_cpu(row)]
    if not row.details.why.is_known:
        reason = row.not_measured.get(MeasuredPart.WHY)
        return [f"The bottleneck of decoding was not measured{f': {reason}' if reason else ''}."]
    explained_baseline = baseline if baseline is not None and baseline.details.why.is_known else None
    return [
        *_speed(row, row.decode_tokens_per_s, baseline),
        *_verdicts(row, explained_baseline),
        *_without_host(row, explained_baseline),
    ]


def explain_speed_briefly(row: ResultRow, baseline: ResultRow | None) -> str | None:
    """One line for the foot of a table; None if there is nothing to explain."""
    ratio = _rate_ratio(row, baseline)
    if row.is_baseline or baseline is None or ratio is None:
        return None
    if not row.details.why.is_known:
        return None
    mark = noise_mark(DECODE, row, baseline)
    origin = f" (measured with {row.speed_from})" if row.speed_from else ""
    reasons = "; ".join(_brief_parts(row, baseline))
    return f"decodes at {show_ratio(ratio)}{mark} of its baseline's rate{origin}: {reasons}"


def _on_cpu(row: ResultRow) -> Iterable[str]:
    yield "What limits the rate of decoding is measured on GPUs only; no other figure depends on it."
    # Where some layers need another kernel, the row's warnings say so.
    if row.details.audits.cpu_layers_on_generic_kernel == 0:
        remark = describe_row(row.scheme).cpu_remark(show_scheme(row))
        if remark is not None:
            yield remark


# What was measured


def _speed(row: ResultRow, tokens_per_s: float, baseline: ResultRow | None) -> Iterable[str]:
    name, rate = show_scheme(row), show_rate(tokens_per_s, "tok")
    if baseline is None or not baseline.decode_tokens_per_s:
        yield f"{name} decodes at {rate}."
        return
    base_rate = show_rate(baseline.decode_tokens_per_s, "tok")
    if same_speed(DECODE, row, baseline):
        yield f"{name} decodes at {rate}, the baseline at {base_rate}: {NOT_DISTINGUISHABLE}."
    else:
        ratio = show_ratio(tokens_per_s / baseline.decode_tokens_per_s)
        yield f"{name} decodes at {ratio} of the baseline ({rate} against {base_rate})."


def _rate_ratio(row: ResultRow, baseline: ResultRow | None) -> float | None:
    if baseline is None or row.decode_tokens_per_s is None or not baseline.decode_tokens_per_s:
        return None
    return row.decode_tokens_per_s / baseline.decode_tokens_per_s


# What limits


def _verdicts(row: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    if baseline is not None and row.details.why.verdict == baseline.details.why.verdict == Verdict.HOST_BOUND:
        yield (
            f"Both wait for the host: the device is busy for {_busy(row)} of a step, and for {_busy(baseline)} with "
            f"the baseline{_launches(row, baseline)}."
        )
        return
    yield f"{show_scheme(row)} {_verdict(row)}{_launches(row, baseline) if _is_waiting(row) else ''}."
    if row.details.why.verdict == Verdict.SYNCHRONIZATION_BOUND and (cause := _synchronization_cause(row)) is not None:
        yield cause
    if row.details.why.verdict == Verdict.KERNEL_BOUND and baseline is not None:
        yield from _bytes_saved(row, baseline)
    if baseline is not None:
        yield f"The baseline {_verdict(baseline)}."


def _verdict(row: ResultRow) -> str:
    """The predicate of a sentence whose subject is the row."""
    verdict = row.details.why.verdict
    if verdict == Verdict.HOST_BOUND:
        return f"waits for the host: the device is busy for {_busy(row)} of a step"
    if verdict == Verdict.SYNCHRONIZATION_BOUND:
        stops = row.details.why.profile.synchronizations
        times = NOTHING if stops is None else f"{stops:.0f}"
        return f"waits for the host {times} times a step: the device is busy for {_busy(row)} of it"
    if verdict == Verdict.MEMORY_BOUND:
        moved = show_bytes(row.details.why.work.bytes)
        return f"is memory-bound: a step moves {moved} at {_copy_share(row)} of the bandwidth of a plain copy"
    if verdict == Verdict.COMPUTE_BOUND:
        return f"is compute-bound: it reaches {_matmul_share(row)} of the rate of a large matrix product"
    if verdict == Verdict.KERNEL_BOUND:
        return (
            f"is limited by its own kernels: the device is busy for {_busy(row)} of a step, but reaches only "
            f"{_copy_share(row)} of the bandwidth of a plain copy and {_matmul_share(row)} of the rate of a large "
            "matrix product"
        )
    return f"has an unknown bottleneck: {row.details.why.reason or 'no reason is on record'}"


def _is_waiting(row: ResultRow) -> bool:
    return row.details.why.verdict in _WAITING


def _synchronization_cause(row: ResultRow) -> str | None:
    return describe_row(row.scheme).synchronization_cause(row.options)


def _launches(row: ResultRow, baseline: ResultRow | None) -> str:
    own = row.details.why.profile.launches
    base = None if baseline is None else baseline.details.why.profile.launches
    if not own or not base:
        return ""
    return f"; a step launches {_times(own / base)} as many kernels ({own:,.0f} against {base:,.0f})"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×"


def _bytes_saved(row: ResultRow, baseline: ResultRow) -> Iterable[str]:
    own, base = row.details.why.work.bytes, baseline.details.why.work.bytes
    slower = (row.details.why.profile.device_busy_s or 0) > (baseline.details.why.profile.device_busy_s or 0)
    if own < base and slower:
        yield (
            f"A step reads {show_bytes(own)} against the baseline's {show_bytes(base)}, but its kernels do not become "
            "faster by it."
        )


# What would be left if the host cost nothing


def _without_host(row: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    own, base = (r.details.why.kernels_alone.step_s if r is not None else None for r in (row, baseline))
    if own and base:
        yield _host_free(row, baseline, own, base)
    elif own:
        yield f"{_faster_host(row)} {_kernels(row)} alone would take {show_seconds(own)} a step."
    elif reason := row.details.why.kernels_alone.reason:
        yield f"The kernels of {show_scheme(row)} could not be timed alone: {reason}."
        yield from _by_profile(row, baseline)


def _host_free(row: ResultRow, baseline: ResultRow | None, own: float, base: float) -> str:
    ratio = base / own
    return (
        f"{_faster_host(row, baseline)} {_kernels(row)} alone would take {show_seconds(own)} a step against the "
        f"baseline's {show_seconds(base)}: {show_ratio(ratio)} of the rate{_conclusion(row, baseline, ratio)}."
    )


def _kernels(row: ResultRow) -> str:
    return f"the kernels of {show_scheme(row)}"


def _faster_host(*rows: ResultRow | None) -> str:
    if any(row is not None and _is_waiting(row) for row in rows):
        return "On a host that keeps up, or with CUDA graphs,"
    return "Without the host's delays, as with CUDA graphs,"


def _conclusion(row: ResultRow, baseline: ResultRow | None, ratio: float) -> str:
    ratio_here = _rate_ratio(row, baseline)
    if row.is_baseline or baseline is None or ratio_here is None:
        return ""
    differs_here = not same_speed(DECODE, row, baseline)
    slower_here = differs_here and ratio_here < 1
    faster_here = differs_here and not slower_here
    # Compared as shown: a reader could not see a difference at ×1.00.
    if show_ratio(ratio) == show_ratio(1.0):
        return ", so it would be as fast there" if slower_here else ""
    if ratio > 1:
        return ", so it would be faster there too" if faster_here else ", so it would be faster there"
    return ", so it would be slower there too" if slower_here else ", so it would be slower there"


def _by_profile(row: ResultRow, baseline: ResultRow | None) -> Iterable[str]:
    """Yield a bound from the profile: a step takes at least as long as the device is busy in it."""
    own, base = (r.details.why.profile.device_busy_s if r is not None else None for r in (row, baseline))
    if own and base:
        yield (
            f"According to the profile, they take {show_seconds(own)} of a step against the baseline's "
            f"{show_seconds(base)}: at best {show_ratio(base / own)} of the rate, on a host that keeps up."
        )


# Shares and rates


def _busy(row: ResultRow) -> str:
    share = row.details.why.busy_share
    return NOTHING if share is None else f"{share * 100:.0f} %"


def _copy_share(row: ResultRow) -> str:
    return _share(row.details.why.work.bytes, row, row.details.why.roofs.copy_bytes_per_s)


def _matmul_share(row: ResultRow) -> str:
    return _share(row.details.why.work.flops, row, row.details.why.roofs.matmul_flops_per_s)


def _share(work: float | None, row: ResultRow, roof: float | None) -> str:
    busy_s = row.details.why.profile.device_busy_s
    if work is None or not busy_s or not roof:
        return NOTHING
    share = work / busy_s / roof * 100
    return f"{show_float(share, 2) if share < 10 else f'{share:.0f}'} %"


def _brief_parts(row: ResultRow, baseline: ResultRow) -> Iterable[str]:
    verdict = row.details.why.verdict
    if verdict is None:
        yield f"bottleneck unknown ({row.details.why.reason or 'no reason is on record'})"
        return
    own, base = row.details.why.profile.launches, baseline.details.why.profile.launches
    launches = f", {_times(own / base)} the launches" if _is_waiting(row) and own and base else ""
    yield f"{verdict} (device busy {_busy(row)} of a step{launches})"
    alone, base_alone = (one.details.why.kernels_alone.step_s for one in (row, baseline))
    if alone and base_alone:
        yield f"its kernels alone would reach {show_ratio(base_alone / alone)} of that rate"

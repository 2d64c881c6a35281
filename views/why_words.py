"""Why decoding is as fast as it is, in words: from ``details.why`` (docs/measurements.md), and claiming no more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qbatch.core.methods.registry import describe_row
from qbatch.views.figures import Row, dig
from qbatch.views.noise import NOISE_MARK, NOT_DISTINGUISHABLE, same_speed
from qbatch.views.scheme import is_baseline, show_scheme
from qbatch.views.units import show_bytes, show_float, show_rate, show_ratio, show_seconds

_WAITING = ("host-bound", "synchronization-bound")
_RATE = "decode_tokens_per_s"


def why(row: Row, baseline: Row | None) -> list[str]:
    """Sentences on a measured row's decoding, beside its baseline's where the two may be compared (one protocol, one
    device; else None). Empty for a model that does not decode."""
    if row.get(_RATE) is None:
        return []
    if on_cpu(row):
        return [*_on_cpu(row)]
    if _reasons(row) is None:
        return ["Its reasons were not measured."]
    beside = baseline if baseline is not None and _reasons(baseline) is not None else None
    return [
        *_speed(row, baseline),
        *_verdicts(row, beside),
        *_without_host(row, beside),
    ]


def why_briefly(row: Row, baseline: Row | None) -> str | None:
    """One line for a table's foot; None where there is nothing to say."""
    if is_baseline(row) or row.get(_RATE) is None or baseline is None or not baseline.get(_RATE):
        return None
    if on_cpu(row):
        layers = dig(row, "details.audits.cpu_layers_on_generic_kernel")
        return describe_row(row["scheme"]).on_cpu_briefly(layers or 0)
    if _reasons(row) is None:
        return None
    ratio = _rate_ratio(row, baseline) + (NOISE_MARK if same_speed(_RATE, row, baseline) else "")
    return f"decodes at {ratio} of its baseline: " + "; ".join(_brief_parts(row, baseline))


def on_cpu(row: Row) -> bool:
    """Whether a measured row ran on a CPU: a GPU has a UUID."""
    details = row.get("details") or {}
    return "device_uuid" in details and details["device_uuid"] is None


def _reasons(row: Row) -> Any:
    return dig(row, "details.why")


def _get(row: Row, path: str) -> Any:
    return dig(row, f"details.why.{path}")


def _on_cpu(row: Row) -> Iterable[str]:
    yield "On a CPU qbatch gives no verdict, since nothing there tells waiting from working."
    layers = dig(row, "details.audits.cpu_layers_on_generic_kernel")
    said = None if layers is None else describe_row(row["scheme"]).on_cpu(show_scheme(row), layers)
    if said is not None:
        yield said


# What was measured


def _speed(row: Row, baseline: Row | None) -> Iterable[str]:
    name, rate = show_scheme(row), show_rate(row[_RATE], "tok")
    if baseline is None or not baseline.get(_RATE):
        yield f"{name} decodes at {rate}."
        return
    base_rate = show_rate(baseline[_RATE], "tok")
    if same_speed(_RATE, row, baseline):
        yield f"{name} decodes at {rate}, the baseline at {base_rate}: {NOT_DISTINGUISHABLE}."
    else:
        yield f"{name} decodes at {_rate_ratio(row, baseline)} of the baseline ({rate} against {base_rate})."


def _rate_ratio(row: Row, baseline: Row) -> str:
    return show_ratio(row[_RATE] / baseline[_RATE])


# What limits


def _verdicts(row: Row, baseline: Row | None) -> Iterable[str]:
    if baseline is not None and _get(row, "verdict") == _get(baseline, "verdict") == "host-bound":
        yield (
            f"Both wait for the host: the device is busy for {_busy(row)} of a step, with the baseline for "
            f"{_busy(baseline)}{_launches(row, baseline)}."
        )
        return
    yield f"{show_scheme(row)} {_verdict(row)}{_launches(row, baseline) if _is_waiting(row) else ''}."
    if _get(row, "verdict") == "synchronization-bound" and (cause := _why_it_waits(row)) is not None:
        yield cause
    if _get(row, "verdict") == "kernel-bound" and baseline is not None:
        yield from _bytes_saved(row, baseline)
    if baseline is not None:
        yield f"The baseline {_verdict(baseline)}."


def _verdict(row: Row) -> str:
    """What follows a row's name."""
    verdict = _get(row, "verdict")
    if verdict == "host-bound":
        return f"waits for the host: the device is busy for {_busy(row)} of a step"
    if verdict == "synchronization-bound":
        stops = f"{_get(row, 'profile.synchronizations'):.0f}"
        return f"waits for the host {stops} times a step: the device is busy for {_busy(row)} of it"
    if verdict == "memory-bound":
        moved = show_bytes(round(_step_bytes(row)))
        return f"is bound by memory: a step moves {moved} at {_copy_share(row)} of what a plain copy reaches"
    if verdict == "compute-bound":
        return f"is bound by arithmetic: at {_matmul_share(row)} of what a large matrix product reaches"
    if verdict == "kernel-bound":
        return (
            f"is bound by its own kernels: the device is busy for {_busy(row)} of a step, at {_copy_share(row)} of "
            f"what a plain copy reaches and {_matmul_share(row)} of what a large matrix product does"
        )
    return f"gets no verdict: {_get(row, 'reason') or 'no reason is on record'}"


def _is_waiting(row: Row) -> bool:
    return _get(row, "verdict") in _WAITING


def _why_it_waits(row: Row) -> str | None:
    return describe_row(row["scheme"]).waits_because(row.get("options") or {})


def _launches(row: Row, baseline: Row | None) -> str:
    ours = _get(row, "profile.launches")
    theirs = None if baseline is None else _get(baseline, "profile.launches")
    if not ours or not theirs:
        return ""
    return f"; a step launches {_times(ours / theirs)} as many kernels ({ours:,.0f} against {theirs:,.0f})"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×"


def _bytes_saved(row: Row, baseline: Row) -> Iterable[str]:
    ours, theirs = _step_bytes(row), _step_bytes(baseline)
    slower = (_get(row, "profile.device_busy_s") or 0) > (_get(baseline, "profile.device_busy_s") or 0)
    if ours < theirs and slower:
        yield (
            f"A step reads {show_bytes(round(ours))} against the baseline's {show_bytes(round(theirs))}, and its "
            "kernels do not turn that into time."
        )


# What would be left if the host cost nothing


def _without_host(row: Row, baseline: Row | None) -> Iterable[str]:
    ours, theirs = (_get(r, "kernels_alone.step_s") if r is not None else None for r in (row, baseline))
    if ours and theirs:
        yield _host_free(row, baseline, ours, theirs)
    elif ours:
        yield f"{_faster_host(row)} {_kernels(row)} alone would take {show_seconds(ours)} a step."
    elif reason := _get(row, "kernels_alone.reason"):
        yield f"The kernels of {show_scheme(row)} alone could not be timed: {reason}."
        yield from _by_profile(row, baseline)


def _host_free(row: Row, baseline: Row | None, ours: float, theirs: float) -> str:
    ratio = theirs / ours
    said = f"{_kernels(row)} alone would take {show_seconds(ours)} a step against the baseline's {show_seconds(theirs)}"
    return f"{_faster_host(row, baseline)} {said}: {show_ratio(ratio)} of its rate{_conclusion(row, baseline, ratio)}."


def _kernels(row: Row) -> str:
    return f"the kernels of {show_scheme(row)}"


def _faster_host(*rows: Row | None) -> str:
    if any(row is not None and _is_waiting(row) for row in rows):
        return "On a host that keeps up, or with CUDA graphs,"
    return "Without the host, under a CUDA graph,"


def _conclusion(row: Row, baseline: Row | None, ratio: float) -> str:
    if is_baseline(row) or baseline is None or not baseline.get(_RATE):
        return ""
    differs_here = not same_speed(_RATE, row, baseline)
    slower_here = differs_here and row[_RATE] < baseline[_RATE]
    faster_here = differs_here and not slower_here
    # As they are shown: ×1.00 is no difference that a reader could see.
    if show_ratio(ratio) == show_ratio(1.0):
        return ", so there it would be as fast" if slower_here else ""
    if ratio > 1:
        return ", so it would be faster there too" if faster_here else ", so there it would be the faster one"
    return ", so it would be slower there too" if slower_here else ", so there it would be the slower one"


def _by_profile(row: Row, baseline: Row | None) -> Iterable[str]:
    """A step takes at least as long as the device is busy in it."""
    ours, theirs = (_get(r, "profile.device_busy_s") if r is not None else None for r in (row, baseline))
    if ours and theirs:
        yield (
            f"By the profile they are busy for {show_seconds(ours)} of a step against the baseline's "
            f"{show_seconds(theirs)}: {show_ratio(theirs / ours)} of its rate at best, on a host that keeps up."
        )


# Shares and rates


def _busy(row: Row) -> str:
    return f"{_get(row, 'busy_share') * 100:.0f} %"


def _step_bytes(row: Row) -> float:
    work = _get(row, "work") or {}
    return float(work.get("weight_bytes", 0) + work.get("cache_bytes", 0))


def _copy_share(row: Row) -> str:
    return _share(_step_bytes(row), row, _get(row, "roofs.copy_bytes_per_s"))


def _matmul_share(row: Row) -> str:
    return _share(_get(row, "work.flops"), row, _get(row, "roofs.matmul_flops_per_s"))


def _share(work: float, row: Row, roof: float) -> str:
    share = work / _get(row, "profile.device_busy_s") / roof * 100
    return f"{show_float(share, 2) if share < 10 else f'{share:.0f}'} %"


def _brief_parts(row: Row, baseline: Row) -> Iterable[str]:
    verdict = _get(row, "verdict")
    if verdict is None:
        yield f"no verdict, {_get(row, 'reason') or 'without a reason'}"
        return
    ours, theirs = _get(row, "profile.launches"), _get(baseline, "profile.launches")
    launches = f", {_times(ours / theirs)} the launches" if _is_waiting(row) and ours and theirs else ""
    yield f"{verdict} (device busy {_busy(row)} of a step{launches})"
    steps = _get(row, "kernels_alone.step_s"), _get(baseline, "kernels_alone.step_s")
    if all(steps):
        yield f"kernels alone at {show_ratio(steps[1] / steps[0])} of its rate"

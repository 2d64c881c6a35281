"""How much of a model was actually quantized, and warnings about its checkpoint and measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qbatch.core.measured.checkpoint_audit import SKIPPED_ON_REQUEST, AdapterTraining, CheckpointAudit
from qbatch.core.measured.quality_figures import ITS_OUTPUTS_NOT_FINITE
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.measured.speed_figures import NOTABLE_SPREAD, Phase
from qbatch.core.methods.registry import describe_row
from qbatch.views.formats import NOTHING
from qbatch.views.units import show_bytes, show_count, show_percent

_NAMED = 3
_WORST_SHOWN = 5
_UNFAIR = {
    "foreign_processes": "other processes used the GPU",
    "throttled": "the GPU lowered its clocks because of heat or its power limit",
    "clocks_changed": "the GPU's clocks changed",
}
_TIMED = {
    Phase.PREFILL: "prefill time",
    Phase.DECODE: "decode rate",
    Phase.PER_TOKEN: "time for each token",
    Phase.FORWARD: "forward time",
}


def audit_warnings(row: ResultRow) -> Iterable[str]:
    """Yield what a reader must know before using a row's figures. Nothing if all is well."""
    yield from unmarked_warnings(row)
    if row.details.audits.spread_between_rounds:
        # Without the number, so that several rows can share the footnote.
        yield (
            f"its {_what_varied(row)} varied much between its rounds (`qbatch show --all JOB` says by how much), so a "
            "difference of that size may be caused by the host"
        )


def _what_varied(row: ResultRow) -> str:
    """The figures of the phases that varied; the speed, where that is not known."""
    spreads = {name: row.details.by_round(phase).spread or 0.0 for phase, name in _TIMED.items()}
    return " and ".join(name for name, spread in spreads.items() if spread > NOTABLE_SPREAD) or "speed"


def unmarked_warnings(row: ResultRow) -> Iterable[str]:
    """The warnings of ``audit_warnings``, except those that tables show as a mark at the figure."""
    fraction = row.quantized_fraction
    if not row.is_baseline and fraction is not None and fraction + _skipped_on_request(row) < 0.5:
        yield (
            f"only {fraction * 100:.3g} % of its parameters are stored in {row.bits} bits: "
            f"the rest is {row.dtype} (`qbatch show --all JOB` says why)"
        )
    yield from defects(row)
    if (kernels := cpu_kernel_warning(row)) is not None:
        yield kernels
    dropped = row.details.audit.dropped_tensors
    if dropped:
        yield (
            f"it lacks {_count(len(dropped), 'tensor')} of the source, which transformers drops: {first_names(dropped)}"
        )
    idle = row.details.audit.idle_skip_modules
    if idle:
        yield f"--skip-modules names layers that it does not have: {first_names(idle)}"
    if row.details.noise_inputs is not None:
        yield "its speed and memory were measured on noise, so they are not compared (`qbatch show --all JOB` has them)"
    if (origin := speed_origin(row)) is not None:
        yield origin
    yield from fairness_remarks(row.details.flags)
    yield from fairness_remarks(row.details.why.energy.flags, during="while its energy was measured")


def _skipped_on_request(row: ResultRow) -> float:
    """The share of its parameters that a skip list, perhaps that of a mixture, leaves at 16 bits."""
    kept = row.details.audit.kept or ()
    skipped = sum(part.parameters or 0 for part in kept if part.reason == SKIPPED_ON_REQUEST)
    return skipped / row.num_parameters if row.num_parameters else 0.0


def speed_origin(row: ResultRow) -> str | None:
    """A sentence that says which job a row's speed is from; None if the row was timed itself."""
    if row.speed_from is None:
        return None
    return f"its speed and its peaks of memory are those of {row.speed_from}, a model of the same shape in its batch"


def cpu_kernel_warning(row: ResultRow) -> str | None:
    """What must be known of a row that was measured on a CPU with other kernels than the library would choose."""
    layers = row.details.audits.cpu_layers_on_generic_kernel
    return describe_row(row.scheme).cpu_warning(layers) if layers else None


def fairness_remarks(flags: Mapping[str, bool] | None, *, during: str = "while it was measured") -> Iterable[str]:
    """Yield what disturbed the GPU during the measurement."""
    for name, raised in (flags or {}).items():
        if raised:
            yield f"{during}, {_UNFAIR.get(name, name.replace('_', ' '))}"


def defects(row: ResultRow) -> Iterable[str]:
    """Yield what makes a checkpoint unfit to ship."""
    broken = row.details.audit.not_finite
    if broken:
        verb = "contains" if len(broken) == 1 else "contain"
        yield f"{len(broken)} of its weights {verb} NaN or infinity: {first_names(broken)}"
    yield from describe_row(row.scheme).defects(row.details.audit.stored)
    if row.details.audits.perplexity_not_finite:
        yield "its perplexity is not finite: some predictions are NaN, or give a token a probability of almost zero"
    elif row.details.quality.reason == ITS_OUTPUTS_NOT_FINITE:
        yield f"it cannot be used: {ITS_OUTPUTS_NOT_FINITE}"
    if row.top1_agreement is not None and row.kl_mean is None:
        # Both come from the same predictions, and only finite figures are stored.
        yield "its KL is not finite: some predictions are NaN, or give a token that the baseline expects no probability"


def audit_lines(row: ResultRow) -> Iterable[tuple[str, str]]:
    """The coverage audit as (title, text). ``row`` must be a quantized row with a result."""
    yield "quantized", _coverage(row)
    if row.bits_per_param is not None:
        yield "bits per parameter", f"{row.bits_per_param:.2f}"
    audit = row.details.audit
    if not audit.is_known:
        yield "audit", "not recorded"
        return
    for part in audit.kept or ():
        count = NOTHING if part.parameters is None else show_count(part.parameters)
        yield f"left at {row.dtype}", f"{part.name}: {part.reason} ({count})"
    dropped = audit.dropped_tensors or ()
    yield (
        "dropped by transformers",
        f"{_count(len(dropped), 'tensor')}: {first_names(dropped, 10)}" if dropped else "none",
    )
    if audit.stale_quantization is not None:
        yield "ignored", f"what the source's config says of a quantization: {audit.stale_quantization}"
    if audit.forward not in (None, "ran"):
        yield "before publishing", f"a forward pass: {audit.forward}"
    yield from _errors(audit)
    yield from describe_row(row.scheme).audit_lines(audit.stored)
    yield from _recovery(audit)
    if audit.writer == "whole":
        yield "written", f"from the whole model in memory, because {audit.whole_model_because}"
    elif audit.shared_pass:
        others = audit.shared_pass - 1
        yield (
            "written",
            "streamed, "
            + (
                f"in one pass with {_count(others, 'other scheme')}; the time is that of the pass"
                if others
                else "alone"
            ),
        )


def _recovery(audit: CheckpointAudit) -> Iterable[tuple[str, str]]:
    """What an adapter leaves of what quantizing took."""
    if audit.recovered_layers is None:
        return
    shares = [
        f"{show_percent(share)} of that of the {of}"
        for share, of in (
            (audit.weight_error_left, "weights"),
            (audit.output_error_left, "layers' outputs on its text"),
        )
        if share is not None
    ]
    left = f"; of the error it leaves {' and '.join(shares)} (ratios of norms)" if shares else ""
    yield "adapter", f"factors for {_count(audit.recovered_layers, 'layer')}{left}"
    if audit.training.is_known:
        yield "trained", _training(audit.training)


def _training(training: AdapterTraining) -> str:
    resumed = f", the last ones after a restart at step {training.resumed_after_step}"
    kl = "" if training.last_kl is None else f"; the KL on its own text was {training.last_kl:.1e} in the last"
    return (
        f"{_count(training.steps or 0, 'step')} with {training.optimizer}"
        f"{resumed if training.resumed_after_step else ''}{kl}"
    )


def loader_lines(row: ResultRow) -> Iterable[tuple[str, str]]:
    """What each loader makes of the checkpoint, as it was judged when it was published."""
    for name, judgement in (row.details.audit.loaders or {}).items():
        yield name, f"{judgement.verdict} ({judgement.version}, {judgement.read_on})"
        yield from ((name, reason) for reason in judgement.reasons or ())
        yield from ((name, f"→ {advice}") for advice in judgement.advice or ())


def _coverage(row: ResultRow) -> str:
    size = row.details.size
    share = NOTHING if row.quantized_fraction is None else show_percent(row.quantized_fraction)
    if size.quantized_parameters is None or size.num_parameters is None:
        return f"{share} of its parameters"
    state = f", {show_bytes(size.quant_state_bytes)} of scales and tables" if size.quant_state_bytes else ""
    quantized, total = show_count(size.quantized_parameters), show_count(size.num_parameters)
    return f"{share} of its parameters ({quantized} of {total}){state}"


def _errors(audit: CheckpointAudit) -> Iterable[tuple[str, str]]:
    mean = audit.relative_error_mean
    if mean is not None:
        yield "relative error", f"{mean:.4f} on average over its layers (Frobenius norm of the error over the weight's)"
    for layer in (audit.relative_error_worst or ())[:_WORST_SHOWN]:
        yield "worst layers", f"{NOTHING if layer.error is None else f'{layer.error:.4f}'}  {layer.name}"
    if audit.not_finite is not None:
        yield "NaN or infinity in", first_names(audit.not_finite, 10) if audit.not_finite else "no tensor"


def other_audits(row: ResultRow) -> Iterable[tuple[str, str]]:
    """Audits that this version does not know, as (title, text), named as the benchmark named them."""
    for name, value in row.details.audits.unknown().items():
        if value not in (None, False, 0, [], {}):
            yield name.replace("_", " "), str(value) if not isinstance(value, bool) else "yes"


def first_names(names: Iterable[str], most: int = _NAMED) -> str:
    """``a, b, c and 9 more``"""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

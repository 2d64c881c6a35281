"""How much each group of layers loses by being quantized, as a search measured it."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.stored_json import Stored, omitted_if_unknown

STANDARD_ERRORS = 2.0
"""How many standard errors a figure must be away from another to be called different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup(Stored):
    """Linear layers that are kept at 16 bits together or not at all: they read one input, or an engine fuses them.

    ``layer`` is the repeated block that they lie in, None if they lie in none. The bytes are those of their weights in
    a published checkpoint, with scales and tables.
    """

    name: str
    layer: str | None
    modules: tuple[str, ...]
    parameters: int
    bytes_at_16_bits: int
    bytes_quantized: int

    @property
    def extra_bytes(self) -> int:
        """What keeping the group at 16 bits costs."""
        return self.bytes_at_16_bits - self.bytes_quantized

    def per_byte(self, gain: float) -> float:
        """What a byte gains, if the group gains this much. The scales and tables of a weight of a few values take more
        than quantizing it saves; it counts as if it cost one byte."""
        return gain / max(1, self.extra_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Stored):
    """A mean over all tokens, and its standard error, clustered by window; None for a single window."""

    mean: float
    standard_error: float | None

    @property
    def upper(self) -> float:
        """The mean plus two standard errors; infinite if the error is not known."""
        return float("inf") if self.standard_error is None else self.mean + STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightErrors(Stored):
    """What is known of a group's weights without running the model. None of it says what the group does to the output.

    ``quantized``: the Frobenius norm of the error of the search's method, divided by that of the weights.
    ``min_max_4_bits`` and ``min_max_8_bits``: the same for rounding to evenly spaced levels, 16 or 256 of them, from a
    weight's smallest value to its largest.
    """

    quantized: float
    min_max_4_bits: float
    min_max_8_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSensitivity(Stored):
    """By how much the KL divergence of the quantized model falls if this group alone is kept at 16 bits, in nats.

    ``derivative``: as the slope of the KL at the quantized model predicts it; None if no backward pass was made.
    ``measured``: the KL of the quantized model minus that with this group at 16 bits, paired window by window; None if
    it was not measured. ``is_open``: whether the derivatives could not tell its place from that of a neighbour.
    """

    group: LayerGroup
    derivative: Estimate | None
    measured: Estimate | None
    is_open: bool
    weight_errors: WeightErrors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity(Stored):
    """All groups of a model, in the order of what a byte at 16 bits gains, the best first.

    ``kl``: that of the quantized model against the model at 16 bits. ``rank_correlation``: Spearman's, between the
    gains per byte by derivative and as measured, of the ``compared_groups`` that have both; None for fewer than three.
    ``slope_scale``: measured gains are on average this fraction of what the derivatives predict; None without both.
    ``unreached``: groups that the text does not reach, so that nothing is known of them; they stay quantized.
    ``forward_passes``: what the search cost, counted in passes through the whole model over all windows.
    """

    method: str
    windows: int
    rows: int
    kl: Estimate
    groups: tuple[GroupSensitivity, ...]
    compared_groups: int
    rank_correlation: float | None
    slope_scale: float | None
    unreached: tuple[str, ...]
    forward_passes: float
    why_no_derivative: str | None = omitted_if_unknown()

    def gain_per_byte(self, sensitivity: GroupSensitivity) -> float:
        return sensitivity.group.per_byte(self.gain(sensitivity))

    def gain(self, sensitivity: GroupSensitivity) -> float:
        """The best figure there is for a group: as measured, else by its derivative, scaled like those of the others
        turned out to be. Zero if it has neither."""
        if sensitivity.measured is not None:
            return sensitivity.measured.mean
        if sensitivity.derivative is None:
            return 0.0
        return sensitivity.derivative.mean * (1.0 if self.slope_scale is None else self.slope_scale)

"""A figure beside its baseline's, where the two may be set side by side."""

from __future__ import annotations

from qbatch.views.figures import Figure, Row, dig
from qbatch.views.noise import NOISE_MARK, is_noise


def show_beside(figure: Figure, row: Row, baseline: Row | None) -> str:
    """``×0.57``, with a mark where the difference is noise; "" where there is nothing to compare.

    A ratio wants the baseline's protocol, and for speed and memory its device.
    """
    key = figure.key(row)
    if key is None:
        return ""
    other = baseline if baseline is not None and may_compare(row, baseline, on_device=figure.on_device) else None
    mark = NOISE_MARK if is_noise(key, row, other) else ""
    if figure.ratio is None or other is None or not dig(other, key):
        # A figure that is a comparison in itself, such as KL.
        return mark if figure.ratio is None else ""
    return figure.ratio(dig(row, key) / dig(other, key)) + mark


def may_compare(row: Row, baseline: Row, *, on_device: bool) -> bool:
    """Whether two rows were measured by one protocol on one model, and where it matters on one device: under one name
    may have lain several."""
    if row["protocol_hash"] != baseline["protocol_hash"]:
        return False
    if dig(row, "details.fingerprint") != dig(baseline, "details.fingerprint"):
        return False
    return not on_device or bool(row["device_name"] == baseline["device_name"])

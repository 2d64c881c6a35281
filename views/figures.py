"""Which measured figures people compare, and how each is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qbatch.views.formats import NOTHING
from qbatch.views.units import (
    show_bytes,
    show_change,
    show_float,
    show_nats,
    show_percent,
    show_rate,
    show_ratio,
    show_seconds,
)

Row = Mapping[str, Any]


def dig(row: Row, path: str) -> Any:
    """What stands under a dotted path of nested mappings (``details.quality.kl_mean``); None where the path ends."""
    found: Any = row
    for name in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the table. ``keys``: the first that a row has (a dotted path; see ``dig``) is shown, by its own
    ``show``: a language model's rate and an encoder's share a column.

    ``ratio`` None: not compared. ``on_device``: comparable on one device alone. ``rank``: the higher leaves first
    where the terminal is too narrow.
    """

    keys: Mapping[str, tuple[str, Callable[[Any], str]]]
    ratio: Callable[[float], str] | None = show_ratio
    on_device: bool = False
    rank: int = 0

    def key(self, row: Row) -> str | None:
        return next((key for key in self.keys if dig(row, key) is not None), None)

    def title(self, rows: Iterable[Row]) -> str:
        present = {self.key(row) for row in rows}
        return "/".join(title for key, (title, _) in self.keys.items() if key in present)

    def show(self, row: Row) -> str:
        key = self.key(row)
        return NOTHING if key is None else self.keys[key][1](dig(row, key))


FIGURES: tuple[Figure, ...] = (
    Figure(keys={"disk_bytes": ("disk", show_bytes)}),
    Figure(keys={"weights_bytes": ("weights", show_bytes)}, rank=3),
    Figure(keys={"max_allocated_bytes": ("peak memory", show_bytes)}, on_device=True, rank=2),
    Figure(
        keys={"prefill_s_p50": ("prefill", show_seconds), "forward_s_p50": ("forward", show_seconds)},
        on_device=True,
        rank=1,
    ),
    Figure(
        keys={
            "decode_tokens_per_s": ("decode", lambda value: show_rate(value, "tok")),
            "forward_samples_per_s": ("throughput", lambda value: show_rate(value, "sample")),
        },
        on_device=True,
    ),
    Figure(keys={"perplexity": ("perplexity", show_float)}, ratio=show_change),
    Figure(keys={"kl_mean": ("KL", show_nats)}, ratio=None, rank=1),
    Figure(keys={"top1_agreement": ("top-1", show_percent)}, ratio=None, rank=3),
    Figure(keys={"details.quality.rank_correlation": ("rank corr", lambda value: f"{value:.4f}")}, ratio=None, rank=1),
    Figure(keys={"bits_per_param": ("bits/param", lambda value: f"{value:.2f}")}, ratio=None, rank=4),
    Figure(keys={"quantize_s": ("quantize", show_seconds)}, ratio=None, rank=5),
    Figure(keys={"load_model_s": ("load", show_seconds)}, ratio=None, rank=6),
)

# What there is room for where a few rows of one model stand side by side.
MORE_FIGURES: tuple[Figure, ...] = (
    Figure(keys={"details.quality.kl_mean_se": ("KL's standard error", show_nats)}, ratio=None),
    Figure(keys={"details.quality.floor.kl_mean": ("KL of 16 bits alone", show_nats)}, ratio=None),
    Figure(keys={"details.quality.kl_p99": ("KL p99", show_nats)}, ratio=None),
    Figure(keys={"details.quality.cosine_mean": ("cosine", lambda value: f"{value:.4f}")}, ratio=None),
    Figure(keys={"per_token_s_p50": ("per token p50", show_seconds)}, on_device=True),
    Figure(keys={"per_token_s_p99": ("per token p99", show_seconds)}, on_device=True),
    Figure(keys={"details.why.kernels_alone.step_s": ("kernels alone", show_seconds)}, on_device=True),
    Figure(
        keys={
            "details.why.energy.decode.net_j_per_token": ("energy a token", lambda value: f"{show_float(value, 3)} J")
        },
        on_device=True,
    ),
)
ALL_FIGURES = (*FIGURES, *MORE_FIGURES)

"""Which measured figures people compare, and how each is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from views.tables import NOTHING
from views.units import show_bytes, show_change, show_float, show_nats, show_rate, show_ratio, show_seconds

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of the table. ``keys``: the first that a row has is shown, by its own ``show``: a language model's
    rate and an encoder's share a column.

    ``ratio`` None: not compared. ``on_device``: comparable on one device alone. ``rank``: the higher leaves first
    where the terminal is too narrow.
    """

    keys: Mapping[str, tuple[str, Callable[[Any], str]]]
    ratio: Callable[[float], str] | None = show_ratio
    on_device: bool = False
    rank: int = 0

    def key(self, row: Row) -> str | None:
        return next((key for key in self.keys if row.get(key) is not None), None)

    def title(self, rows: Iterable[Row]) -> str:
        present = {self.key(row) for row in rows}
        return "/".join(title for key, (title, _) in self.keys.items() if key in present)

    def show(self, row: Row) -> str:
        key = self.key(row)
        return NOTHING if key is None else self.keys[key][1](row[key])


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
    Figure(keys={"top1_agreement": ("top-1", lambda value: f"{value * 100:.1f} %")}, ratio=None, rank=3),
    Figure(keys={"bits_per_param": ("bits/param", lambda value: f"{value:.2f}")}, ratio=None, rank=4),
    Figure(keys={"quantize_s": ("quantize", show_seconds)}, ratio=None, rank=5),
    Figure(keys={"load_model_s": ("load", show_seconds)}, ratio=None, rank=6),
)

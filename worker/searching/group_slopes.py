"""What each group promises at the mixture that the model is now, by one backward pass over each window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qbatch.worker.measuring.quality.divergence import Divergence
from qbatch.worker.searching.derivative_screen import window_slopes
from qbatch.worker.searching.layer_outputs import WindowOutputs, recorded
from qbatch.worker.searching.opened_search import OpenedSearch

# A forward pass, a backward pass to the layers' outputs, the products with the weights' changes, which cost as much
# each, and the rest: seen with 300 million parameters on a CPU.
_PASSES = 3.75

Gains = Mapping[str, Sequence[float]]
"""By group, by how much the sum of the KL of each window's rows is predicted to fall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSlopes:
    """``windows``: the mixture's own divergence; ``outputs``: what its blocks answered, empty where not kept."""

    gains: Gains
    windows: Sequence[Divergence]
    outputs: Sequence[WindowOutputs]

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(value) for values in self.gains.values() for value in values)


def group_slopes(search: OpenedSearch, *, keep_outputs: bool) -> GroupSlopes:
    """The slopes of all groups. Those of groups that are at 16 bits already mean nothing."""
    blocks = search.layers.blocks if keep_outputs else ()
    gains: dict[str, list[float]] = {name: [] for name in search.groups}
    windows, kept = [], []
    for number, probe in enumerate(search.probes):
        search.report(f"backward pass {number + 1} of {len(search.probes)}")
        with recorded(search.loaded.model, blocks) as outputs:
            window = window_slopes(search.mixed, probe, search.loaded.device, search.base.of(number))
        windows.append(window.divergence)
        kept.append(outputs)
        for name, group in search.groups.items():
            gains[name].append(-math.fsum(window.slopes.get(module, 0.0) for module in group.modules))
    search.passes += _PASSES
    return GroupSlopes(gains=gains, windows=windows, outputs=kept if blocks else [])

"""A mixture measured as it is, and two mixtures compared window by window."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from qbatch.core.search.sensitivity import Estimate
from qbatch.core.statistics.clusters import clustered_error
from qbatch.worker.measuring.quality.divergence import Divergence
from qbatch.worker.searching.layer_outputs import WindowOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureQuality:
    """The mixture that keeps the groups ``at_16_bits``, on every window.

    ``outputs``: what its blocks answered on each window, empty where that was not kept.
    """

    at_16_bits: Set[str]
    windows: Sequence[Divergence]
    outputs: Sequence[WindowOutputs]

    @property
    def rows(self) -> list[int]:
        return [len(window.kl) for window in self.windows]

    @property
    def kl_sums(self) -> list[float]:
        return [float(window.kl.sum()) for window in self.windows]

    @property
    def kl(self) -> Estimate:
        return estimate(self.kl_sums, self.rows)

    @property
    def ln_ppl_ratio(self) -> Estimate | None:
        """The logarithm of the ratio of perplexities; None if the rows have no correct token."""
        if not all(len(window.nll) for window in self.windows):
            return None
        return estimate([float(torch.sum(each.nll - each.base_nll)) for each in self.windows], self.rows)

    def gain_over(self, other: MixtureQuality) -> Estimate:
        """How much lower the KL is than that of ``other``, paired window by window."""
        pairs = zip(other.kl_sums, self.kl_sums, strict=True)
        return estimate([worse - better for worse, better in pairs], self.rows)


def estimate(sums: Sequence[float], rows: Sequence[int]) -> Estimate:
    """The mean over all rows of windows whose rows have these sums."""
    return Estimate(mean=sum(sums) / sum(rows), standard_error=clustered_error(sums, rows))

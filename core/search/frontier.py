"""The mixtures that a search found: each keeps more groups at 16 bits than the one before, and was measured whole."""

from __future__ import annotations

from dataclasses import dataclass

from qbatch.core.search.sensitivity import Estimate
from qbatch.core.stored_json import Stored, omitted_if_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint(Stored):
    """A mixture. All figures are measured on it as it is, on the search's own text.

    ``added``: the groups that it keeps at 16 bits and the point before it does not; ``modules``: the layers of all its
    groups, by full name. ``weights_bytes``: what a result calls by that name. ``gain``: how much lower its KL is than
    that of the point before, paired window by window. ``ln_ppl_ratio``: None of a model whose text has no targets.
    ``same_as``: the first point whose KL cannot be told from this one's, by their paired difference or because both are
    at most the floor; None if it can be told from all before it. ``skip_list``: what a checkpoint of it publishes,
    which may name layers twice, as engines call them; None until that was found out.
    """

    added: tuple[str, ...]
    modules: tuple[str, ...]
    weights_bytes: int
    kl: Estimate
    gain: Estimate | None = None
    ln_ppl_ratio: Estimate | None = None
    same_as: int | None = omitted_if_unknown()
    skip_list: tuple[str, ...] | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier(Stored):
    """The points by ascending bytes, from everything quantized on. ``forward_passes``: what they cost to find.

    ``floor_kl``: the KL of the model at 16 bits against itself in float32. No mixture is looked for beyond the first
    that is not above it. None if the search computed in float32, or had no memory for a copy in it.
    """

    method: str
    windows: int
    rows: int
    points: tuple[FrontierPoint, ...]
    forward_passes: float
    floor_kl: float | None = omitted_if_unknown()

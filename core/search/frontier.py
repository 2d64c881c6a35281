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
    ``skip_list``: what a checkpoint of it publishes, which may name layers twice, as engines call them; None until that
    was found out.
    """

    added: tuple[str, ...]
    modules: tuple[str, ...]
    weights_bytes: int
    kl: Estimate
    gain: Estimate | None = None
    ln_ppl_ratio: Estimate | None = None
    skip_list: tuple[str, ...] | None = omitted_if_unknown()


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier(Stored):
    """The points by ascending bytes, from everything quantized on. ``forward_passes``: what they cost to find."""

    method: str
    windows: int
    rows: int
    points: tuple[FrontierPoint, ...]
    forward_passes: float

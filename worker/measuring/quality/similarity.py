"""How well an encoder's embeddings keep their place after quantization."""

from __future__ import annotations

import torch

from qbatch.core.measured.quality_figures import Quality


def embedding(hidden: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the last hidden state [1, tokens, width], float32 [width]. There is no padding."""
    return hidden[0].float().mean(0)


def compare_embeddings(base: torch.Tensor, other: torch.Tensor) -> Quality:
    """Set embeddings ``other`` beside those of the base, both [pieces, width], piece by piece and pair by pair.

    ``cosine_*``: cosine of each piece's two embeddings once the mean over all pieces is taken off; raw cosines say
    little, being above 0.96 even between different texts. ``rank_correlation``: Spearman's, between the two
    models' similarities of all pairs of pieces: what a search would notice. With fewer than
    three pieces there is a ``reason`` instead.
    """
    base, other = _centred(base), _centred(other)
    if len(base) < 3:
        return Quality(pieces=len(base), reason="similarities take three pieces of text or more")
    cosines = torch.nn.functional.cosine_similarity(base, other)
    return Quality(
        pieces=len(base),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        rank_correlation=_spearman(_pair_similarities(base), _pair_similarities(other)),
    )


def _centred(embeddings: torch.Tensor) -> torch.Tensor:
    embeddings = embeddings.double()
    return embeddings - embeddings.mean(0)


def _pair_similarities(embeddings: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]


def _spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's correlation of the ranks."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ascending ranks, equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middle: torch.Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[inverse]

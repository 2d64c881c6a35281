"""How well an encoder's embeddings are preserved by quantization."""

from __future__ import annotations

import torch

from qbatch.core.measured.quality_figures import Quality
from qbatch.worker.measuring.stats import rank_correlation


def embedding(hidden: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the last hidden states [1, tokens, width], without padding: float32 [width]."""
    return hidden[0].float().mean(0)


def compare_embeddings(base: torch.Tensor, other: torch.Tensor) -> Quality:
    """Compare the embeddings ``other`` with those of the base, both [pieces, width].

    ``cosine_*``: cosine between a piece's two embeddings after the mean over all pieces is subtracted; without that,
    cosines are above 0.96 even between different texts. ``rank_correlation``: Spearman's rank correlation between the
    two models' similarities of all pairs of pieces, which is what a search depends on. With fewer than three pieces,
    only a ``reason``.
    """
    base, other = _centred(base), _centred(other)
    if len(base) < 3:
        return Quality(pieces=len(base), reason="similarities need at least three pieces of text")
    cosines = torch.nn.functional.cosine_similarity(base, other)
    return Quality(
        pieces=len(base),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        rank_correlation=rank_correlation(_pair_similarities(base).tolist(), _pair_similarities(other).tolist()),
    )


def _centred(embeddings: torch.Tensor) -> torch.Tensor:
    embeddings = embeddings.double()
    return embeddings - embeddings.mean(0)


def _pair_similarities(embeddings: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]

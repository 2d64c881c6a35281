"""A bound on the bytes of a search that not even the model with every layer quantized keeps to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qbatch.core.domain import JobSpec
from qbatch.core.errors import BoundNotKept
from qbatch.core.output_size import output_size
from qbatch.core.sources import Header


def refuse_unmeetable_bound(specs: Sequence[JobSpec], headers: Sequence[Header], config: Mapping[str, Any]) -> None:
    """Raise BoundNotKept where a search is certain to fail, though it would take long to find that out. Nothing is
    certain of an architecture whose layers are judged by their names."""
    for spec in specs:
        most = None if spec.search is None else spec.search.bound.max_weights_bytes
        if most is None:
            continue
        least = output_size(headers, config, spec.scheme, spec.dtype)
        if least.off_by is not None and least.weights_bytes > most:
            raise BoundNotKept(
                f"--max-weights-bytes allows {most:,} bytes, and with every layer quantized the weights take "
                f"{least.weights_bytes:,}"
            )

"""What the checkpoints that publish mixtures say of the layers that they leave unquantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qbatch.core.domain import Scheme
from qbatch.core.search.frontier import Frontier, FrontierPoint
from qbatch.worker.quantizing.planning.skeleton import quantized_linears, skip_lists_keeping


def with_skip_lists(cls: Any, config: Any, scheme: Scheme, frontier: Frontier) -> Frontier:
    """The frontier with what a checkpoint of each point publishes, without a point at which nothing is quantized: that
    is no checkpoint of the scheme, and nothing could verify it as one."""
    quantized = quantized_linears(cls, config, scheme.skip_modules)
    mixtures = [point for point in frontier.points if quantized - set(point.modules)]
    lists = _skip_lists(cls, config, scheme, mixtures)
    points = (replace(point, skip_list=listed) for point, listed in zip(mixtures, lists, strict=True))
    return replace(frontier, points=tuple(points))


def _skip_lists(cls: Any, config: Any, scheme: Scheme, points: Sequence[FrontierPoint]) -> list[tuple[str, ...]]:
    lists = skip_lists_keeping(cls, config, scheme.skip_modules, [set(point.modules) for point in points])
    # With nothing to skip, a checkpoint is that of the plain scheme.
    is_plain = [not point.modules and not scheme.skip_modules for point in points]
    return [() if plain else listed for plain, listed in zip(is_plain, lists, strict=True)]

"""Whether two texts share a passage: what is chosen on one text says nothing about another that repeats it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

SHARED_TOKENS = 13
"""Texts that share a run of this many tokens are not disjoint."""


def shared_run(
    first: Sequence[Hashable], second: Sequence[Hashable], length: int = SHARED_TOKENS
) -> tuple[Hashable, ...] | None:
    """The first run of ``length`` tokens of ``first`` that ``second`` has too; None if they share none."""
    known = {tuple(second[begin : begin + length]) for begin in range(len(second) - length + 1)}
    runs = (tuple(first[begin : begin + length]) for begin in range(len(first) - length + 1))
    return next((run for run in runs if run in known), None)

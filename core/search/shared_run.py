"""Whether two texts share a passage: what is chosen on one text says nothing about another that repeats it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from qbatch.core.control_characters import escape_controls

SHARED_TOKENS = 13
"""Texts that share a run of this many tokens are not disjoint."""


Token = TypeVar("Token", bound=Hashable)


def shared_run(
    first: Sequence[Token], second: Sequence[Token], length: int = SHARED_TOKENS
) -> tuple[Token, ...] | None:
    """The first run of ``length`` tokens of ``first`` that ``second`` has too; None if they share none."""
    known = {tuple(second[begin : begin + length]) for begin in range(len(second) - length + 1)}
    runs = (tuple(first[begin : begin + length]) for begin in range(len(first) - length + 1))
    return next((run for run in runs if run in known), None)


def shared_passage_text(passage: str) -> str:
    """Why a text that an adapter is trained on is refused."""
    return (
        f"the recovery text shares {SHARED_TOKENS} tokens in a row with an evaluation text "
        f"({escape_controls(passage)!r}), so figures on that would say nothing; give another --recover-text or "
        "--eval-text"
    )

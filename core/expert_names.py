"""The names of a mixture's experts, of which a layer has many: ``mlp.experts.3.w1``, ``mlp.experts.expert_3.wi``."""

from __future__ import annotations

import re

ANY_EXPERT = "*"
_NUMBER = re.compile(r"(expert_?)?\d+")


def without_expert_number(name: str) -> list[str]:
    """The parts of a module's name, with ``ANY_EXPERT`` for the number of an expert."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if "expert" in part), len(parts))
    return parts[:first] + [ANY_EXPERT if _NUMBER.fullmatch(part) else part for part in parts[first:]]


def experts_of(name: str) -> str | None:
    """What all experts of the module's layer are called together; None if it is part of no expert."""
    parts = without_expert_number(name)
    return ".".join(parts[: parts.index(ANY_EXPERT) + 1]) if ANY_EXPERT in parts else None

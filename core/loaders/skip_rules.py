"""How transformers and how vLLM read an entry of a checkpoint's skip list. They do not read it alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# An entry that is a regular expression ends where a component of the name ends.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"

SkipRule = Callable[[str], bool]
"""Whether a module of that name is skipped."""


def transformers_skips(entries: Iterable[str]) -> SkipRule:
    """The beginning of the name up to a dot, as text or as a regular expression; or any end of it, dot or not."""
    compiled = [(re.compile(rf"(?:{entry}){_BOUNDARY}"), entry) for entry in entries]
    return lambda name: any(pattern.match(name) or name.endswith(entry) for pattern, entry in compiled)


def vllm_skips(entries: Iterable[str]) -> SkipRule:
    """One whole component of the name, or its beginning up to a dot. SGLang's rule is the same."""
    listed = frozenset(entries)

    def skips(name: str) -> bool:
        components = name.split(".")
        beginnings = (".".join(components[:count]) for count in range(1, len(components) + 1))
        return not listed.isdisjoint(components) or not listed.isdisjoint(beginnings)

    return skips

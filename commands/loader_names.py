"""Reads the names of loaders that ``verify --for`` was given."""

from __future__ import annotations

from qbatch.core.errors import UsageError


def parse_loaders(text: str) -> tuple[str, ...]:
    """``vllm,peft`` → the names, each once, in that order. Raises UsageError."""
    from qbatch.core.loaders.known_loaders import LOADERS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in LOADERS:
            raise UsageError(f"{name!r} is not a loader that qbatch knows (use {', '.join(LOADERS)})")
    if not names:
        raise UsageError(f"no loader was named (use {', '.join(LOADERS)})")
    return names

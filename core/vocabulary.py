"""How many tokens a model knows, as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the embedding of tokens, that of a language model within a larger one too; None if the
    config does not say it."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if type(size := part.get("vocab_size")) is int and size > 0:
            return size
    return None

"""transformers' own class for a model type, where a config spells its architecture otherwise, or names none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qbatch.core.model_heads import DEFAULT_MAPPINGS, MAPPINGS_OF_HEADS


def class_of_type(config_class: type, name: str | None) -> Any:
    """The class for ``config_class`` where transformers does not have the class ``name``.

    It has the same head by its name, or the same name but for capitals. Without a name, it is the causal LM of the
    type, or else the base model. None if transformers has no such class.
    """
    if name is None:
        return next(_classes(config_class, DEFAULT_MAPPINGS), None)
    for ending, mappings in MAPPINGS_OF_HEADS:
        if name.endswith(ending):
            return next(_classes(config_class, mappings), None)
    return next((cls for cls in _classes(config_class, DEFAULT_MAPPINGS) if cls.__name__.lower() == name.lower()), None)


def _classes(config_class: type, mappings: tuple[str, ...]) -> Iterator[Any]:
    from transformers.models.auto import modeling_auto

    for mapping in (getattr(modeling_auto, listed) for listed in mappings):
        if config_class in mapping:
            cls = mapping[config_class]
            yield cls[0] if isinstance(cls, tuple) else cls

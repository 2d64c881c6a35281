"""transformers' own class for a model type, where a config spells its architecture otherwise, or names none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# The end of a class's name, and the auto mappings that hold such classes, by their names in transformers.
_HEADS = (
    ("ForCausalLM", ("MODEL_FOR_CAUSAL_LM_MAPPING",)),
    ("LMHeadModel", ("MODEL_FOR_CAUSAL_LM_MAPPING",)),
    ("ForConditionalGeneration", ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")),
    ("ForMaskedLM", ("MODEL_FOR_MASKED_LM_MAPPING",)),
    ("ForSequenceClassification", ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",)),
    ("ForTokenClassification", ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",)),
    ("ForQuestionAnswering", ("MODEL_FOR_QUESTION_ANSWERING_MAPPING",)),
)
_DEFAULTS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_MAPPING")


def class_of_type(config_class: type, name: str | None) -> Any:
    """The class for ``config_class`` where transformers does not have the class ``name``.

    It has the same head by its name, or the same name but for capitals. Without a name, it is the causal LM of the
    type, or else the base model. None if transformers has no such class.
    """
    if name is None:
        return next(_classes(config_class, _DEFAULTS), None)
    for ending, mappings in _HEADS:
        if name.endswith(ending):
            return next(_classes(config_class, mappings), None)
    return next((cls for cls in _classes(config_class, _DEFAULTS) if cls.__name__.lower() == name.lower()), None)


def _classes(config_class: type, mappings: tuple[str, ...]) -> Iterator[Any]:
    from transformers.models.auto import modeling_auto

    for mapping in (getattr(modeling_auto, listed) for listed in mappings):
        if config_class in mapping:
            cls = mapping[config_class]
            yield cls[0] if isinstance(cls, tuple) else cls

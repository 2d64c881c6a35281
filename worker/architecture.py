"""Which transformers class a model is, from what its config says of itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from models_db.errors import Unsupported


class Task(StrEnum):
    """What a model computes; it decides how it is measured."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    SEQ2SEQ = "seq2seq"
    ENCODER = "encoder"


def _architecture(config: Any) -> str | None:
    names: list[str] = getattr(config, "architectures", None) or []
    return names[0] if names else None


def model_class(config: Any) -> Any:
    """The class named by ``config.architectures``; without one, the causal LM of that model type, else its body.

    Raises Unsupported where this transformers has no such model class.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    name = _architecture(config)
    if name is not None:
        cls = getattr(transformers, name, None)
        # config.json is the source's word: "pipeline" is an attribute of transformers too.
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise Unsupported(f"transformers {transformers.__version__} has no architecture {name}")
        return cls
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise Unsupported(f"config.json names no architecture, and {config.model_type} has no default")


def task_of(config: Any) -> Task:
    """The task of ``model_class(config)``. A multiple-choice or tagging head is measured as an encoder, and so is
    the body of an encoder-decoder, which has no tokens to say; a vision-language model as the causal LM inside."""
    from transformers.models.auto import modeling_auto as auto

    cls = model_class(config)
    # A class may stand in several mappings (BART's generates and fills masks; GPT-2's does more): first fit wins.
    for task, names in (
        (Task.SEQ2SEQ, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (Task.CAUSAL_LM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (Task.MASKED_LM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        (Task.SEQUENCE_CLASSIFICATION, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ):
        if cls.__name__ in names.values():
            return task
    return Task.CAUSAL_LM if cls.can_generate() and not config.is_encoder_decoder else Task.ENCODER

"""Determines transformers' config and class for a model, and the kind of model, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from qbatch.core.errors import SourceCorrupt, UnsafeSource, Unsupported
from qbatch.core.prior_quantization import QUANTIZATION_KEYS, declares_quantization, stale_quantization
from qbatch.core.sources import read_config, read_headers
from qbatch.worker.models.class_of_type import class_of_type
from qbatch.worker.models.remote_code import REFUSAL

# Exceptions that transformers raises for a config with invalid values.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


class ModelKind(StrEnum):
    """What a model computes, which determines how it is measured."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105  # no password
    SEQ2SEQ = "seq2seq"
    ENCODER = "encoder"


# The auto classes for which a config's auto_map may name a class of the model's own code.
_OWN_KINDS = {
    "AutoModelForCausalLM": ModelKind.CAUSAL_LM,
    "AutoModelForSeq2SeqLM": ModelKind.SEQ2SEQ,
    "AutoModelForMaskedLM": ModelKind.MASKED_LM,
    "AutoModelForSequenceClassification": ModelKind.SEQUENCE_CLASSIFICATION,
    "AutoModelForTokenClassification": ModelKind.TOKEN_CLASSIFICATION,
    "AutoModel": None,
}


def load_config(folder: Path, *, trusted: bool) -> Any:
    """transformers' config of the model in ``folder``, without a quantization that the weights do not have. The model's
    own code runs only if ``trusted``.

    Raises UnsafeSource if the model needs its own code and is not trusted, Unsupported if this version of transformers
    does not know the model type, SourceCorrupt for any other fault.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True)
    except (*_UNREADABLE, StrictDataclassError) as error:
        text = str(error) or type(error).__name__
        if "trust_remote_code" in text:
            raise UnsafeSource(REFUSAL) from error
        kind = Unsupported if "does not recognize" in text else SourceCorrupt
        raise kind(f"transformers cannot read config.json: {text.splitlines()[0]}") from error
    raw_config = read_config(folder)
    if declares_quantization(raw_config) and stale_quantization(raw_config, read_headers(folder)) is not None:
        _drop_quantization(config)
    _refuse_extra_files(config, folder)
    return config


def _refuse_extra_files(config: Any, folder: Path) -> None:
    """Raise Unsupported if transformers would read files of weights that were not checked."""
    for name in getattr(type(config), "extra_files", ()):
        if (folder / name).exists():
            raise Unsupported(f"{name} holds weights beside those of the model, which qbatch does not read")


def _drop_quantization(config: Any) -> None:
    """Remove what ``config`` and its parts say of a quantization: transformers would look for packed weights."""
    from transformers import PreTrainedConfig

    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for key in QUANTIZATION_KEYS:
            if hasattr(part, key):
                delattr(part, key)


def _architecture(config: Any) -> str | None:
    names: list[str] = getattr(config, "architectures", None) or []
    return names[0] if names else None


def model_class(config: Any, *, trusted: Path | None = None) -> Any:
    """The class named in ``config.architectures``. If none is named, the causal LM of the model type, or else the base
    model without a head.

    A class that transformers does not have is loaded from ``trusted``, the model's folder. If that is None, or the
    model brings no code, transformers' own class for the model type is used, as its auto classes would. Raises
    UnsafeSource if there is none and code is needed, Unsupported if this version of transformers has no such class.
    """
    own = _own_class(config)
    if own is not None and trusted is not None:
        return _dynamic_class(own[1], trusted)
    name = _architecture(config)
    if name is not None and _is_in_library(name):
        return _library_class(name)
    cls = class_of_type(type(config), name)
    if cls is not None:
        return cls
    if own is not None:
        raise UnsafeSource(REFUSAL)
    if name is not None:
        return _library_class(name)
    raise Unsupported(f"config.json names no architecture, and {config.model_type} has no default")


def _library_class(name: str) -> Any:
    import transformers

    if not _is_in_library(name):
        raise Unsupported(f"transformers {transformers.__version__} has no architecture {name}")
    return getattr(transformers, name)


def _is_in_library(name: str | None) -> bool:
    import transformers

    # config.json is not trusted: the name could be any attribute of transformers, such as "pipeline".
    cls = getattr(transformers, name, None) if name is not None else None
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def _dynamic_class(reference: str, trusted: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(trusted), local_files_only=True)


def _own_class(config: Any) -> tuple[str, str] | None:
    """An auto class, and the model's own class for it as ``module.Class``: the class that is its architecture, or else
    the first. None if transformers has the architecture."""
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(auto_map, Mapping) or _is_in_library(_architecture(config)):
        return None
    own = [(auto, auto_map[auto]) for auto in _OWN_KINDS if isinstance(auto_map.get(auto), str)]
    name = _architecture(config)
    return next((pair for pair in own if pair[1].rpartition(".")[2] == name), own[0] if own else None)


def kind_of(config: Any, *, trusted: Path | None = None) -> ModelKind:
    """The kind of ``model_class(config)``.

    Models with heads for multiple choice or question answering are measured as encoders, and so are encoder-decoders
    without a head, which cannot generate. A vision-language or audio-language model is measured as the causal LM that
    it contains.
    """
    from transformers.models.auto import modeling_auto as auto

    cls = model_class(config, trusted=trusted)
    own = _own_class(config) if trusted is not None else None
    if own is not None and (kind := _OWN_KINDS[own[0]]) is not None:
        return kind
    # A class may be in several mappings (BART's generates and fills masks). The first match wins.
    for kind, names in (
        (ModelKind.SEQ2SEQ, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (ModelKind.CAUSAL_LM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (ModelKind.MASKED_LM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        (ModelKind.SEQUENCE_CLASSIFICATION, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (ModelKind.TOKEN_CLASSIFICATION, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ):
        # transformers lists language models that hear under the first, though they have no encoder for text.
        if cls.__name__ in names.values() and (kind is not ModelKind.SEQ2SEQ or config.is_encoder_decoder):
            return kind
    return ModelKind.CAUSAL_LM if cls.can_generate() and not config.is_encoder_decoder else ModelKind.ENCODER

"""The model without its weights: transformers' own class on the meta device, its quantizer already applied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models_db.domain import DType, Method, Scheme
from models_db.errors import SourceCorrupt, UnsafeSource, Unsupported
from worker.architecture import model_class


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model class and its instance on the meta device, as ``from_pretrained`` has it before it loads weights.

    ``model`` has bitsandbytes' modules where weights will be quantized; ``default_skips`` are the modules that
    transformers leaves out of its own accord.
    """

    cls: Any
    model: Any
    quantizer: Any
    default_skips: frozenset[str]


def build_skeleton(source: Path, scheme: Scheme, dtype: DType, device: str) -> Skeleton:
    """The quantized meta-device model of ``source`` for one scheme, with weights of ``dtype``.

    Raises SourceCorrupt, UnsafeSource, Unsupported.
    """
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    config = _with_dtype(load_config(source), dtype)
    cls = model_class(config)
    skips = default_skips(cls, config) if scheme.skip_modules else frozenset()
    quantizer = AutoHfQuantizer.from_config(quantization_config(scheme, skips), pre_quantized=False)
    config.quantization_config = quantizer.quantization_config
    model = _meta_model(cls, config, quantizer, device)
    return Skeleton(cls=cls, model=model, quantizer=quantizer, default_skips=frozenset(get_keys_to_not_convert(model)))


def load_config(source: Path) -> Any:
    """The source's transformers config.

    Raises UnsafeSource where it needs code of its own, Unsupported where this transformers does not know the model
    type, else SourceCorrupt.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error) or type(error).__name__
        if "trust_remote_code" in text:
            raise UnsafeSource("the model needs code of its own, which is never run") from error
        kind = Unsupported if "does not recognize" in text else SourceCorrupt
        raise kind(f"transformers cannot read config.json: {text.splitlines()[0]}") from error


def default_skips(cls: Any, config: Any) -> frozenset[str]:
    """The modules that transformers leaves unquantized unless it is given a list: output layer, tied, last."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return frozenset(get_keys_to_not_convert(_meta_model(cls, config, None, "meta")))


def quantization_config(scheme: Scheme, skips: frozenset[str]) -> Any:
    """transformers' own config of the scheme. The user's skip list is added to ``skips``, the default ones, which
    passing a list would otherwise replace."""
    import torch
    from transformers import BitsAndBytesConfig

    listed = sorted(skips | set(scheme.skip_modules)) if scheme.skip_modules else None
    if scheme.method is Method.INT8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(scheme.int8_threshold), llm_int8_skip_modules=listed
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=listed,
        bnb_4bit_quant_type=scheme.method.value.removeprefix("bnb-"),
        bnb_4bit_use_double_quant=scheme.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, scheme.compute_dtype.value),
        bnb_4bit_quant_storage=scheme.quant_storage,
    )


def _with_dtype(config: Any, dtype: DType) -> Any:
    """The config, saying ``dtype`` everywhere, as ``from_pretrained(dtype=…)`` makes it."""
    import torch

    config.dtype = getattr(torch, dtype.value)
    for name in config.sub_configs:
        if (part := getattr(config, name)) is not None:
            part.dtype = config.dtype
    return config


def _meta_model(cls: Any, config: Any, quantizer: Any, device: str) -> Any:
    from transformers.modeling_utils import ContextManagers

    with ContextManagers(cls.get_init_context(config.dtype, quantizer is not None, False, False)):
        model = cls(config)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=config.dtype, device_map={"": device}, checkpoint_files=None)
    return model

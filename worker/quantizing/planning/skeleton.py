"""Builds the model without its weights: transformers' own class on the meta device, with its quantizer applied."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbatch.core.config_plausibility import refuse_implausible_config
from qbatch.core.domain import DType, Scheme
from qbatch.core.errors import SourceCorrupt, Unsupported, one_line
from qbatch.core.loaders.engine_names import EngineArchitecture, engine
from qbatch.core.loaders.skip_list import SkippedLayers
from qbatch.core.sources import read_config, read_headers
from qbatch.worker.methods.implementations import weights_of, weights_of_config
from qbatch.worker.models.architecture import load_config, model_class

# Exceptions that transformers' classes raise for a config with impossible values, or if a library is missing.
_CANNOT_BUILD = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model class and its instance on the meta device, as ``from_pretrained`` has it before loading weights.

    In ``model``, the layers to quantize are already replaced by the method's modules. ``quantizer`` is None for an
    unquantized model. ``default_skips`` are the modules that transformers does not quantize by default; ``asked_skips``
    are the scheme's patterns, and ``idle_skips`` those of the user that match no layer.
    """

    cls: Any
    model: Any
    quantizer: Any
    default_skips: frozenset[str]
    asked_skips: tuple[str, ...] = ()
    idle_skips: tuple[str, ...] = ()


def build_skeleton(source: Path, scheme: Scheme, dtype: DType, device: str, *, trusted: bool = False) -> Skeleton:
    """The quantized model of ``source`` on the meta device, for one scheme, with unquantized weights in ``dtype``.

    ``trusted`` lets the source's own code run. Raises SourceCorrupt, UnsafeSource, or Unsupported.
    """
    config = _with_dtype(load_config(source, trusted=trusted), dtype)
    cls = model_class(config, trusted=source if trusted else None)
    listed = list(skip_list(cls, config, scheme.skip_modules)) if scheme.skip_modules else None
    quantization = weights_of(scheme.description).quantization_config(scheme, listed)
    skeleton = _skeleton(cls, config, quantization, device)
    # A list that was resolved already has the names that an engine gives to layers: they are at work there.
    spelled = tuple(pattern for pattern in scheme.skip_modules if pattern not in (listed or ()))
    return replace(skeleton, asked_skips=scheme.skip_modules, idle_skips=_idle(skeleton.model, spelled))


def unquantized_skeleton(source: Path, dtype: DType, *, trusted: bool = False) -> Skeleton:
    """The model of ``source`` on the meta device as it is, in ``dtype``. Raises as ``build_skeleton`` does."""
    config = _with_dtype(load_config(source, trusted=trusted), dtype)
    cls = model_class(config, trusted=source if trusted else None)
    model = _meta_model(cls, config, None, "meta")
    return Skeleton(cls=cls, model=model, quantizer=None, default_skips=frozenset())


def published_skeleton(folder: Path, dtype: DType, *, trusted: bool = False) -> Skeleton:
    """The model of a published checkpoint on the meta device, quantized as its own config says.

    Raises SourceCorrupt, UnsafeSource, or Unsupported.
    """
    refuse_implausible_config(read_config(folder), read_headers(folder))
    config = _with_dtype(load_config(folder, trusted=trusted), dtype)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or weights_of_config(quantization) is None:
        raise SourceCorrupt("config.json has no quantization_config of a method that qbatch knows")
    try:
        return _skeleton(model_class(config, trusted=folder if trusted else None), config, quantization, "cpu")
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise SourceCorrupt(f"config.json describes no quantized model: {one_line(error)}") from error


def _skeleton(cls: Any, config: Any, quantization: Any, device: str) -> Skeleton:
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    config.quantization_config = quantizer.quantization_config
    model = _meta_model(cls, config, quantizer, device)
    _refuse_replaced(model, quantizer)
    return Skeleton(cls=cls, model=model, quantizer=quantizer, default_skips=frozenset(get_keys_to_not_convert(model)))


def _refuse_replaced(model: Any, quantizer: Any) -> None:
    """Raise Unsupported if transformers replaces a module when it loads a quantized checkpoint, but not when it writes
    one: the replacement's weights would be missing from the checkpoint."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    method = quantizer.quantization_config.quant_method
    for module in model.modules():
        name = type(module).__name__
        known = MODULES_TO_PATCH_FOR_QUANTIZATION.get(name)
        if known is not None and method in known["quantization_methods"]:
            other = known["module_name"].__name__
            raise Unsupported(f"{name} cannot be quantized: transformers loads a quantized checkpoint into {other}")


def skip_list_of_source(
    source: Path, asked: tuple[str, ...], dtype: DType, *, trusted: bool = False
) -> tuple[str, ...]:
    """``skip_list`` for the model in ``source``. Raises SourceCorrupt, UnsafeSource, or Unsupported."""
    config = _with_dtype(load_config(source, trusted=trusted), dtype)
    return skip_list(model_class(config, trusted=source if trusted else None), config, asked)


def skip_list(cls: Any, config: Any, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The list to publish for a user's patterns: what transformers skips by default, since a list replaces its own, and
    every layer that then stays unquantized by its full names (see ``SkippedLayers``). Two spellings give one list."""
    return skip_list_keeping(cls, config, asked, frozenset())


def skip_list_keeping(cls: Any, config: Any, asked: tuple[str, ...], modules: Set[str]) -> tuple[str, ...]:
    """``skip_list`` with further linear layers, by full name, that stay unquantized."""
    (listed,) = skip_lists_keeping(cls, config, asked, [modules])
    return listed


def skip_lists_keeping(
    cls: Any, config: Any, asked: tuple[str, ...], several: Iterable[Set[str]]
) -> list[tuple[str, ...]]:
    """``skip_list_keeping`` for several sets of layers. The model is built once."""
    from transformers.quantizers.base import get_keys_to_not_convert

    model = _meta_model(cls, config, None, "meta")
    linears, always = _plain_linears(model), get_keys_to_not_convert(model)
    skipped = linears - _quantized(model, asked)
    architecture = engine("vllm").architecture(cls.__name__) or EngineArchitecture()
    return [
        tuple(sorted({*always, *SkippedLayers(linears, skipped | modules, architecture).entries()}))
        for modules in several
    ]


def quantized_linears(cls: Any, config: Any, asked: tuple[str, ...] = ()) -> Set[str]:
    """The linear layers that a method quantizes, by full name, if the patterns ``asked`` are skipped besides what
    transformers skips by default. It asks before weights are tied, and might skip others of a loaded model."""
    return _quantized(_meta_model(cls, config, None, "meta"), asked)


def _quantized(model: Any, asked: tuple[str, ...]) -> Set[str]:
    from transformers.quantizers.base import get_keys_to_not_convert

    patterns = [*get_keys_to_not_convert(model), *asked, *(model._keep_in_fp32_modules or ())]
    return {name for name in _plain_linears(model) if not is_skipped(name, patterns)}


def _plain_linears(model: Any) -> Set[str]:
    return {name for name, module in model.named_modules() if is_plain_linear(module)}


def _idle(model: Any, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The ``patterns`` that match no unquantized layer of ``model``, by transformers' own matching."""
    kept = [name for name, module in model.named_modules() if is_plain_linear(module)]
    return tuple(pattern for pattern in patterns if not any(is_skipped(name, [pattern]) for name in kept))


def is_skipped(module: str, patterns: Iterable[str]) -> bool:
    """Whether one of the ``patterns`` matches the full name of a module, by transformers' own matching."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def is_plain_linear(module: Any) -> bool:
    """Whether ``module`` is a linear layer that a method could have quantized, but did not."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def linear_shape(layer: Any) -> tuple[int, int]:
    """[rows, columns] of the weight of a linear layer. Some models compute the sizes of layers with tensors."""
    return int(layer.out_features), int(layer.in_features)


def _with_dtype(config: Any, dtype: DType) -> Any:
    """Set ``dtype`` in the config and all its parts, as ``from_pretrained(dtype=…)`` does."""
    import torch

    config.dtype = getattr(torch, dtype.value)
    for name in config.sub_configs:
        if (part := getattr(config, name)) is not None:
            part.dtype = config.dtype
    return config


def _meta_model(cls: Any, config: Any, quantizer: Any, device: str) -> Any:
    from transformers.modeling_utils import ContextManagers

    with ContextManagers(cls.get_init_context(config.dtype, quantizer is not None, False, False)):
        model = _instance(cls, config)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=config.dtype, device_map={"": device}, checkpoint_files=None)
    return model


def _instance(cls: Any, config: Any) -> Any:
    """Instantiate the class. Raises Unsupported if a class of transformers cannot be built from the config; exceptions
    from a model's own code pass through."""
    try:
        return cls(config)
    except _CANNOT_BUILD as error:
        if not cls.__module__.startswith("transformers."):
            raise
        raise Unsupported(f"transformers cannot build {cls.__name__} from config.json: {one_line(error)}") from error

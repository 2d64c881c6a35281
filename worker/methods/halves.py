"""A description's half in the worker. A library is imported only where it is needed: some start CUDA then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

from qbatch.core.methods import bnb, torchao, unquantized
from qbatch.core.methods.registry import Description
from qbatch.worker.methods.bnb_weights import WEIGHTS as BNB_WEIGHTS
from qbatch.worker.methods.method_weights import MethodWeights, PlainWeights
from qbatch.worker.methods.torchao_weights import WEIGHTS as TORCHAO_WEIGHTS


def weights_of(description: Description) -> MethodWeights:
    """What does a method's work. Raises ValueError for the baseline, which has none done."""
    match description:
        case bnb.BnbFourBit() | bnb.BnbInt8():
            return BNB_WEIGHTS
        case torchao.Torchao():
            return TORCHAO_WEIGHTS
        case unquantized.Unquantized():
            raise ValueError("the baseline is not quantized")
        case _:
            assert_never(description)


_PLAIN = PlainWeights()
_BY_LIBRARY: Mapping[str, MethodWeights] = {weights.libraries[0]: weights for weights in (BNB_WEIGHTS, TORCHAO_WEIGHTS)}


def weights_of_config(quantization: Any) -> MethodWeights | None:
    """What did a checkpoint's, by its ``quantization_config``: a mapping, or transformers' own object. None where there
    is none, and for a library that qbatch does not know."""
    is_mapping = isinstance(quantization, Mapping)
    method = quantization.get("quant_method") if is_mapping else getattr(quantization, "quant_method", None)
    return _BY_LIBRARY.get(str(getattr(method, "value", method)))


def weights_of_model(model: Any) -> PlainWeights:
    """What counts a loaded model's weights."""
    config = getattr(model, "config", None)
    return weights_of_config(getattr(config, "quantization_config", None)) or _PLAIN

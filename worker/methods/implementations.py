"""Finds the worker's part of a method. Importing this module does not import the methods' libraries, because some of
them start CUDA when they are imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

from qbatch.core.methods import bnb, torchao, unquantized
from qbatch.core.methods.registry import Description
from qbatch.worker.methods.bnb_weights import WEIGHTS as BNB_WEIGHTS
from qbatch.worker.methods.method_weights import MethodWeights, PlainWeights
from qbatch.worker.methods.torchao_weights import WEIGHTS as TORCHAO_WEIGHTS


def weights_of(description: Description) -> MethodWeights:
    """The implementation of a method, by its description. Raises ValueError for the baseline."""
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


def import_usual_library() -> None:
    """Import the library of the methods that ``--bits`` selects, without its warnings and downloads. Starts CUDA."""
    BNB_WEIGHTS.quiet_import()


def weights_of_config(quantization: Any) -> MethodWeights | None:
    """The implementation of a checkpoint's method, by its ``quantization_config``: a mapping, or transformers' own
    object. None if ``quantization`` is None, or of a library that qbatch does not know."""
    is_mapping = isinstance(quantization, Mapping)
    method = quantization.get("quant_method") if is_mapping else getattr(quantization, "quant_method", None)
    return _BY_LIBRARY.get(str(getattr(method, "value", method)))


def weights_of_model(model: Any) -> PlainWeights:
    """The implementation that counts the weights of a loaded model."""
    config = getattr(model, "config", None)
    return weights_of_config(getattr(config, "quantization_config", None)) or _PLAIN

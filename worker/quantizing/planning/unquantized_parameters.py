"""Which parameters a method leaves unquantized, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from qbatch.core.domain import Method
from qbatch.core.errors import Unsupported
from qbatch.core.measured.checkpoint_audit import SKIPPED_ON_REQUEST
from qbatch.worker.methods.packing import Packing
from qbatch.worker.quantizing.planning.skeleton import Skeleton, is_skipped


def needs_quantization(skeleton: Skeleton, packing: Packing, model: Any, name: str) -> bool:
    """Whether the method quantizes a parameter of ``model``: the skeleton's, or one that was loaded like it."""
    if not skeleton.quantizer.param_needs_quantization(model, name):
        return False
    return packing.why_skipped(*model.get_parameter(name).shape) is None


def refuse_nothing_quantized(method: Method, skeleton: Skeleton, packing: Packing) -> None:
    """Raise Unsupported if the method quantizes no layer: the checkpoint would be the source under another name."""
    model = skeleton.model
    names = [name for name, _ in model.named_parameters()]
    if any(needs_quantization(skeleton, packing, model, name) for name in names):
        return
    linear = [name for name in names if is_linear_weight(model, name)]
    reasons = Counter(why_unquantized(skeleton, packing, model, name) for name in linear)
    why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    said = f"why each linear layer stays as it is: {why}" if why else "it has no linear layer"
    raise Unsupported(f"{method} quantizes no layer of {type(model).__name__}; {said}")


def is_linear_weight(model: Any, name: str) -> bool:
    """Whether the parameter ``name`` is the weight of a linear layer of any class."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear | Conv1D)


def why_unquantized(skeleton: Skeleton, packing: Packing, model: Any, name: str) -> str:
    """Why the unquantized parameter ``name`` of ``model`` stays as it is."""
    path = name.rpartition(".")[0]
    parameter = model.get_parameter(name)
    if not is_linear_weight(model, name):
        return "fused experts" if parameter.dim() > 2 and "expert" in name else "not a linear layer"
    lists: Iterable[tuple[Iterable[str], str]] = (
        (skeleton.default_skips, "output layer or tied"),
        (model._keep_in_fp32_modules or (), "kept in a higher precision by the model"),
        (skeleton.asked_skips, SKIPPED_ON_REQUEST),
    )
    for patterns, reason in lists:
        if is_skipped(path, patterns):
            return reason
    narrow = packing.why_skipped(*parameter.shape) if skeleton.quantizer.param_needs_quantization(model, name) else None
    return narrow or f"a {type(model.get_submodule(path)).__name__}, which the method leaves as it is"

"""How much of a model really was quantized, and what was not, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from worker.quantize.skeleton import Skeleton

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# What stays unquantized and is smaller than this is not worth a line of its own.
_WORTH_NAMING = 65_536


def coverage(
    skeleton: Skeleton, model: Any, quantized: Mapping[str, int], weights_bytes: int, dropped: Iterable[str]
) -> dict[str, Any]:
    """Counts over the distinct parameters of the loaded ``model`` (a tied one once).

    ``quantized`` gives the true size of each quantized parameter; ``weights_bytes`` is that of all tensors written.
    """
    total, kept = _count(skeleton, model, quantized)
    packed = sum(quantized.values())
    return {
        "num_parameters": total,
        "quantized_parameters": packed,
        "quantized_fraction": packed / total if total else 0.0,
        "mostly_unquantized": packed * 2 < total,
        "weights_bytes": weights_bytes,
        "bits_per_param": weights_bytes * 8 / total if total else 0.0,
        "kept": kept,
        "dropped_tensors": sorted(dropped),
    }


def _count(skeleton: Skeleton, model: Any, quantized: Mapping[str, int]) -> tuple[int, list[dict[str, Any]]]:
    """Parameters in all, and the large ones that stay as they are, grouped over layers."""
    total = sum(quantized.values())
    groups: Counter[tuple[str, str]] = Counter()
    for name, parameter in model.named_parameters():
        if name in quantized:
            continue
        total += parameter.numel()
        if parameter.numel() >= _WORTH_NAMING:
            groups[_LAYER_NUMBER.sub("*", name), _reason(skeleton, model, name)] += parameter.numel()
    return total, [
        {"name": name, "reason": reason, "parameters": count} for (name, reason), count in groups.most_common()
    ]


def _reason(skeleton: Skeleton, model: Any, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if leaf != "weight" or not _is_linear(model.get_submodule(path)):
        return "fused experts" if model.get_parameter(name).dim() > 2 else "not a linear layer"
    if path in skeleton.default_skips:
        return "output layer or tied"
    if any(part in path for part in model._keep_in_fp32_modules or ()):
        return "kept in float32 by the model"
    return "skipped on request"


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)

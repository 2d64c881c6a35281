"""The audit of a checkpoint: how much of the model was quantized, what was not and why, and the errors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qbatch.worker.methods.method_weights import MethodWeights
from qbatch.worker.methods.packing import FIGURES, Packing
from qbatch.worker.quantizing.planning.skeleton import Skeleton
from qbatch.worker.quantizing.planning.unquantized_parameters import is_linear_weight, why_unquantized

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Unquantized parameters smaller than this are not listed, unless they belong to a linear layer.
_MIN_LISTED_PARAMETERS = 65_536
# Enough for every layer of any model except some mixtures of experts.
_MAX_LISTED_LAYERS = 4096


def coverage(
    skeleton: Skeleton,
    packing: Packing,
    model: Any,
    quantized: Mapping[str, int],
    weights_bytes: int,
    dropped: Iterable[str],
) -> dict[str, Any]:
    """Count over the distinct parameters of the loaded ``model``; a tied parameter counts once.

    ``quantized`` maps the name of each quantized parameter to its number of values before packing. ``weights_bytes``
    is the size of all tensors written. ``dropped`` names the source's tensors that the model does not use.
    """
    total, kept = _count(skeleton, packing, model, quantized)
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
        "idle_skip_modules": list(skeleton.idle_skips),
    }


def is_finite(values: torch.Tensor) -> bool:
    """Whether ``values`` contain no NaN and no infinity. Dtypes of one byte, and integers, count as finite."""
    if not values.is_floating_point() or values.itemsize < 2 or not values.numel():
        return True
    lowest, highest = values.aminmax()  # both are NaN if any value is
    return bool(lowest.isfinite() & highest.isfinite())


def error_audit(
    weights: MethodWeights, figures: Mapping[str, Sequence[Sequence[float]]], not_finite: Iterable[str]
) -> dict[str, Any]:
    """The relative Frobenius error of each quantized weight, worst first, and the names of tensors with NaN or
    infinities.

    ``figures`` holds the FIGURES of each weight's pieces, by parameter name; ``not_finite`` names the unquantized
    tensors that are not finite.
    """
    errors = {name: _relative_error(pieces) for name, pieces in figures.items()}
    finite = {name: error for name, error in errors.items() if math.isfinite(error)}
    worst = sorted(finite, key=lambda name: finite[name], reverse=True)
    pieces = [dict(zip(FIGURES, piece, strict=True)) for several in figures.values() for piece in several]
    return {
        "relative_error_mean": sum(finite.values()) / len(finite) if finite else None,
        "relative_error_worst": [{"name": name, "error": finite[name]} for name in worst[:_MAX_LISTED_LAYERS]],
        "not_finite": sorted((errors.keys() - finite.keys()).union(not_finite)),
    } | weights.audit(pieces)


def _relative_error(pieces: Sequence[Sequence[float]]) -> float:
    """The Frobenius norm of the error divided by that of the values. For a weight of zeros, the norm of the error."""
    error, value = (math.hypot(*norms) for norms in list(zip(*pieces, strict=True))[:2])
    return error / value if value else error


def _count(
    skeleton: Skeleton, packing: Packing, model: Any, quantized: Mapping[str, int]
) -> tuple[int, list[dict[str, Any]]]:
    """The total number of parameters, and the unquantized parameters worth listing, grouped over layers."""
    total = sum(quantized.values())
    groups: Counter[tuple[str, str]] = Counter()
    for name, parameter in model.named_parameters():
        if name in quantized:
            continue
        total += parameter.numel()
        if parameter.numel() >= _MIN_LISTED_PARAMETERS or is_linear_weight(model, name):
            groups[_LAYER_NUMBER.sub("*", name), why_unquantized(skeleton, packing, model, name)] += parameter.numel()
    return total, [
        {"name": name, "reason": reason, "parameters": count} for (name, reason), count in groups.most_common()
    ]

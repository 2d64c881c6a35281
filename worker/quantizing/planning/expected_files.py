"""The tensors that a checkpoint must contain according to its config, determined with transformers' own loading and
saving code, without data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import DType
from qbatch.core.errors import SourceCorrupt
from qbatch.worker.methods.implementations import weights_of_config
from qbatch.worker.methods.packing import Packing, StreamedPacking
from qbatch.worker.quantizing.planning.loaded_names import conversions_of, loaded_name
from qbatch.worker.quantizing.planning.loading import Weight, load_traced
from qbatch.worker.quantizing.planning.saving import as_saved, quantized_state
from qbatch.worker.quantizing.planning.skeleton import Skeleton, published_skeleton
from qbatch.worker.quantizing.tensors.trace import FromSource, TracedTensor, sources_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A tensor that the checkpoint should contain.

    ``tensor`` has the expected dtype and shape, and data only if the values follow from the config. ``tie`` names the
    group of tied tensors that it belongs to, of which the files need only one; None if it is not tied.
    """

    tensor: torch.Tensor
    tie: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedFiles:
    """All expected tensors by name, and the dtype that config.json should state (that of the first parameter)."""

    tensors: Mapping[str, ExpectedTensor]
    config_dtype: str


def expected_files(folder: Path, dtype: DType, names: Iterable[str]) -> ExpectedFiles:
    """What the checkpoint in ``folder``, loaded in ``dtype``, should contain.

    ``names`` are the tensors that it does contain; they show which of transformers' conversions its layout needs.
    Raises SourceCorrupt, UnsafeSource or Unsupported if its config does not describe a model quantized by a known
    method.
    """
    skeleton, packing, weights = load_published(folder, dtype)
    model = skeleton.model
    nested = isinstance(packing, StreamedPacking) and packing.nested
    offsets = dict.fromkeys(weights, 0.0) if nested else {}
    state = quantized_state(model, packing, weights, offsets, "cpu")
    model._weight_conversions = _conversions_used(skeleton, names, state)
    ties = _ties(model)
    tensors = {
        name: ExpectedTensor(tensor=tensor, tie=_tie(tensor, ties)) for name, tensor in as_saved(state, model).items()
    }
    return ExpectedFiles(tensors=tensors, config_dtype=str(model.dtype).removeprefix("torch."))


def load_published(
    folder: Path, dtype: DType, *, trusted: bool = False
) -> tuple[Skeleton, Packing, Mapping[str, Weight]]:
    """The model of a published checkpoint without its data, how it stores a quantized weight, and those weights.
    Raises as ``expected_files`` does."""
    skeleton = published_skeleton(folder, dtype, trusted=trusted)
    quantization = skeleton.quantizer.quantization_config
    weights = weights_of_config(quantization)
    if weights is None:
        raise SourceCorrupt("config.json names a quantization method that qbatch does not know")
    packing = weights.packing_of_config(quantization)
    _, recorder = load_traced(skeleton, packing, _own_tensors(skeleton, packing), [], dtype)
    return skeleton, packing, recorder.weights


def _own_tensors(skeleton: Skeleton, packing: Packing) -> dict[str, TracedTensor]:
    """The model's own state, traced as if it were the source, so that nothing is missing or needs converting."""
    return {
        name: TracedTensor.of(_as_in_source(skeleton, packing, name, tensor), FromSource(name))
        for name, tensor in skeleton.model.state_dict().items()
    }


def _as_in_source(skeleton: Skeleton, packing: Packing, name: str, tensor: torch.Tensor) -> torch.Tensor:
    model = skeleton.model
    if not skeleton.quantizer.param_needs_quantization(model, name):
        return tensor
    return tensor.t() if packing.is_transposed(model.get_submodule(name.rpartition(".")[0])) else tensor


def _conversions_used(skeleton: Skeleton, names: Iterable[str], state: dict[str, Any]) -> list[Any]:
    """The transformers conversions that map ``names`` to keys of ``state``. Names that map to no key are not tensors of
    the model, and are ignored."""
    conversions = conversions_of(skeleton)
    known = [name for name in names if loaded_name(skeleton, name, conversions, state) in state]
    conversions = conversions_of(skeleton)
    for name in known:
        loaded_name(skeleton, name, conversions, state)
    return [conversion for conversion in conversions if conversion.was_used()]


def _ties(model: Any) -> dict[str, str]:
    """The group of each tied parameter by name. A group has the name of the parameter that the others are tied to."""
    ties = {}
    for tied, kept in model.all_tied_weights_keys.items():
        ties[tied] = ties[kept] = kept
    return ties


def _tie(tensor: torch.Tensor, ties: Mapping[str, str]) -> str | None:
    sources = sources_of(tensor.origin) if isinstance(tensor, TracedTensor) else frozenset()
    groups = {ties.get(source) for source in sources}
    return groups.pop() if len(groups) == 1 else None

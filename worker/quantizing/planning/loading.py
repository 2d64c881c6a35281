"""Loads a target's model without its data, by running transformers' own loading code on traced tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import DType
from qbatch.core.errors import JobError, SourceCorrupt, Unsupported
from qbatch.worker.methods.implementations import weights_of
from qbatch.worker.methods.packing import Packing, StreamedPacking
from qbatch.worker.quantizing.planning.initializing import why_overwritten
from qbatch.worker.quantizing.planning.skeleton import Skeleton, build_skeleton, linear_shape
from qbatch.worker.quantizing.planning.unquantized_parameters import needs_quantization, refuse_nothing_quantized
from qbatch.worker.quantizing.target import Target
from qbatch.worker.quantizing.tensors.source_reader import TORCH_DTYPES, SourceReader
from qbatch.worker.quantizing.tensors.trace import (
    Call,
    FromSource,
    Origin,
    QuantizedPart,
    TracedTensor,
    simplified,
    sources_of,
    traced_tensors,
)


class NotStreamable(Exception):
    """The model cannot be quantized tensor by tensor and must be built as a whole. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A parameter to quantize, made from one source tensor (possibly cast).

    ``shape`` is [rows, columns] as it is quantized; if ``transposed``, the source tensor is [columns, rows]. ``dtype``
    is the dtype of the values after casting, before quantization.
    """

    name: str
    source: str
    transposed: bool
    shape: tuple[int, int]
    dtype: torch.dtype
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A target's model with traced tensors in place of weights. ``weights`` are those to quantize, by parameter name;
    ``dropped`` names the source's tensors that the model does not use."""

    target: Target
    packing: StreamedPacking
    skeleton: Skeleton
    weights: Mapping[str, Weight]
    dropped: tuple[str, ...]


def trace_loading(source: Path, reader: SourceReader, target: Target, dtype: DType, device: str) -> TracedModel:
    """Load ``source`` without its data. Values are read only if two tensors may be tied and must be compared.

    Raises SourceCorrupt if a tensor is missing or has the wrong shape, Unsupported, or NotStreamable.
    """
    skeleton = build_skeleton(source, target.scheme, dtype, device, trusted=target.trusted)
    model = skeleton.model
    _refuse_own_ways(skeleton.cls)
    packing = weights_of(target.scheme.description).streamed_packing(target.scheme)
    refuse_nothing_quantized(target.scheme.method, skeleton, packing)
    info, recorder = load_source(skeleton, packing, reader, dtype)
    _refuse_unquantized(skeleton, recorder, info)
    recorder.raise_if_refused()
    refuse_mismatched(info)
    _refuse_conversion_errors(info)
    dropped = unused(reader, model, recorder)
    overwritten = why_overwritten(model, info)
    _tie(model, info, reader)
    refuse_missing(info.missing_keys)
    # Checked last, so that faults of the source are reported before anything falls back to building the whole model.
    recorder.raise_if_not_streamable()
    if overwritten is not None:
        raise NotStreamable(overwritten)
    return TracedModel(target=target, packing=packing, skeleton=skeleton, weights=recorder.weights, dropped=dropped)


def _refuse_own_ways(cls: Any) -> None:
    """Raise NotStreamable for a class that loads and saves what the others do not, as in its generation config."""
    from transformers import PreTrainedModel

    own = {name for base in cls.__mro__[: cls.__mro__.index(PreTrainedModel)] for name in vars(base)}
    if own >= {"from_pretrained", "save_pretrained"}:
        raise NotStreamable(f"{cls.__name__} loads and saves in ways of its own")


def trace_unquantized_loading(reader: SourceReader, skeleton: Skeleton, dtype: DType) -> None:
    """Load the source into an unquantized skeleton's model without its data, as far as its parameters are counted.

    Raises SourceCorrupt if a tensor is missing or has the wrong shape, or NotStreamable.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = skeleton.model
    mapping = get_model_conversion_mapping(model, None, None)
    info = _load_tensors(model, None, _traced_source(reader), mapping, dtype)
    refuse_mismatched(info)
    _refuse_conversion_errors(info)
    model.mark_tied_weights_as_initialized(info)
    _tie(model, info, reader)
    refuse_missing(info.missing_keys)


def load_source(
    skeleton: Skeleton, packing: Packing, reader: SourceReader, dtype: DType
) -> tuple[Any, TracingQuantizer]:
    """``load_traced`` with the source's tensors and transformers' own conversions for the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(skeleton.model, None, skeleton.quantizer)
    return load_traced(skeleton, packing, _traced_source(reader), mapping, dtype)


def load_traced(
    skeleton: Skeleton, packing: Packing, tensors: dict[str, TracedTensor], mapping: list[Any], dtype: DType
) -> tuple[Any, TracingQuantizer]:
    """Load traced ``tensors`` into the skeleton's model, converted by transformers' ``mapping``.

    Returns transformers' report of missing, unexpected and mismatched keys, and the quantizer that recorded which
    weights would be quantized.
    """
    recorder = TracingQuantizer(skeleton, packing)
    needed = {name: tensor.shape for name, tensor in _all_tensors(skeleton.model)}
    info = _load_tensors(skeleton.model, recorder, tensors, mapping, dtype)
    # Before version 5.23, transformers accepts any shape if there is a quantizer.
    for name, tensor in traced_tensors(skeleton.model):
        if name not in recorder.origins and tensor.shape != needed[name]:
            info.mismatched_keys.add((name, tensor.shape, needed[name]))
    return info, recorder


def _load_tensors(
    model: Any, quantizer: TracingQuantizer | None, tensors: dict[str, TracedTensor], mapping: list[Any], dtype: DType
) -> Any:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    torch_dtype = getattr(torch, dtype.value)
    info, _ = convert_and_load_state_dict_in_model(
        model=model,
        state_dict=tensors,
        load_config=LoadStateDictConfig(
            device_map={"": "meta"},
            dtype=torch_dtype,
            dtype_plan=model._get_dtype_plan(torch_dtype),
            hf_quantizer=quantizer,
            weight_mapping=mapping,
        ),
        disk_offload_index=None,
    )
    return info


def _all_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers; a shared one appears under each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _traced_source(reader: SourceReader) -> dict[str, TracedTensor]:
    traced = {}
    for tensor in reader.tensors():
        if tensor.dtype not in TORCH_DTYPES:
            raise NotStreamable(f"{tensor.name} has dtype {tensor.dtype}")
        meta = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        traced[tensor.name] = TracedTensor.of(meta, FromSource(tensor.name))
    return traced


class TracingQuantizer:
    """Replaces transformers' quantizer while loading. It records what would be quantized, and quantizes nothing.

    Errors are recorded too and raised later by ``raise_if_refused``, because transformers swallows exceptions that are
    raised during conversion.
    """

    pre_quantized = False

    def __init__(self, skeleton: Skeleton, packing: Packing) -> None:
        self._skeleton = skeleton
        self._refusals: list[JobError] = []
        self._not_streamable: list[NotStreamable] = []
        self.packing = packing
        self.weights: dict[str, Weight] = {}
        self.origins: dict[str, tuple[Origin, bool]] = {}
        """The origin of every weight that would be quantized, and whether it is transposed first."""

    def param_needs_quantization(self, model: Any, name: str) -> bool:
        return needs_quantization(self._skeleton, self.packing, model, name)

    def get_quantize_ops(self) -> TracingQuantizer:
        return self

    def convert(self, tensors: dict[str, Any], *, model: Any, **_: Any) -> dict[str, torch.Tensor]:
        return {name: self._record(model, name, value) for name, value in tensors.items()}

    def _record(self, model: Any, name: str, value: Any) -> torch.Tensor:
        traced: TracedTensor = value[0] if isinstance(value, list) else value
        module = model.get_submodule(name.rpartition(".")[0])
        # transformers' own quantize operation sets this too, so that nothing in the module is initialized later.
        module._is_hf_initialized = self.packing.marks_initialized
        transposed = self.packing.is_transposed(module)
        needed = linear_shape(module)
        shape = tuple(traced.shape)[::-1] if transposed else tuple(traced.shape)
        origin = simplified(traced.origin)
        self.origins[name] = (origin, transposed)
        if shape != needed:
            self._refusals.append(SourceCorrupt(f"{name} has the shape {shape}, but the model needs {needed}"))
        elif isinstance(origin, Call | QuantizedPart):
            self._not_streamable.append(NotStreamable(f"{name} is converted and then quantized"))
        else:
            if (reason := self.packing.why_unsupported(*needed)) is not None:
                self._refusals.append(Unsupported(f"{name} {reason}"))
            self.weights[name] = _weight(name, origin, transposed, needed, traced.dtype)
        return self.packing.parameter(*needed, traced.dtype, partial(traced_part, name))

    def raise_if_refused(self) -> None:
        for error in self._refusals:
            raise error

    def raise_if_not_streamable(self) -> None:
        for reason in self._not_streamable:
            raise reason


def _weight(name: str, origin: Origin, transposed: bool, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    (source,) = sources_of(origin)
    return Weight(name=name, source=source, transposed=transposed, shape=shape, dtype=dtype, origin=origin)


def traced_part(weight: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TracedTensor:
    """A tensor without data for the part ``key`` of a quantized weight."""
    return TracedTensor.of(torch.empty(shape, dtype=dtype, device="meta"), QuantizedPart(weight, key))


def refuse_missing(keys: Any) -> None:
    """Raise SourceCorrupt if the source lacks ``keys``; transformers would fill them with random numbers."""
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise SourceCorrupt(f"the source lacks {', '.join(names[:3])}{more}")


def _refuse_unquantized(skeleton: Skeleton, recorder: TracingQuantizer, info: Any) -> None:
    """Raise Unsupported if a parameter that should be quantized would be written unquantized.

    When transformers splits one tensor into several parameters, it decides by the first whether all are quantized. The
    others would be written unquantized into quantized layers, and the checkpoint could not be loaded.
    """
    accounted_for = recorder.origins.keys() | info.missing_keys
    for name, _ in skeleton.model.named_parameters():
        if name not in accounted_for and recorder.param_needs_quantization(skeleton.model, name):
            raise Unsupported(f"{name} and a skipped weight are cut from the same tensor: skip both or neither")


def refuse_mismatched(info: Any) -> None:
    """Raise SourceCorrupt if a tensor that stays unquantized has another shape than the model's."""
    for name, shape, needed in sorted(info.mismatched_keys):
        raise SourceCorrupt(f"{name} has the shape {tuple(shape)}, but the model needs {tuple(needed)}")


def _refuse_conversion_errors(info: Any) -> None:
    for name, text in sorted(info.conversion_errors.items()):
        raise NotStreamable(f"{name}: {text.strip().splitlines()[-1]}")


def unused(reader: SourceReader, model: Any, recorder: TracingQuantizer) -> tuple[str, ...]:
    """Names of source tensors that are used by no parameter or buffer of the traced ``model``.

    transformers' own list of unexpected keys contains names after renaming, and omits some keys by pattern.
    """
    used = {name for origin, _ in recorder.origins.values() for name in sources_of(origin)}
    for _, tensor in traced_tensors(model):
        used |= sources_of(tensor.origin)
    return tuple(tensor.name for tensor in reader.tensors() if tensor.name not in used)


def _tie(model: Any, info: Any, reader: SourceReader) -> None:
    """Tie weights as ``from_pretrained`` does.

    If the source has both tensors of a pair, they are tied if their values are equal. transformers cannot compare them
    without data, so they are compared here: an equal one is reported to transformers as missing, and a pair that
    differs is removed from the pairs to tie.
    """
    for tied, kept in list(model.all_tied_weights_keys.items()):
        if tied in info.missing_keys or kept in info.missing_keys:
            continue
        if reader.same_values(model.get_parameter(tied).origin, model.get_parameter(kept).origin):
            info.missing_keys.add(tied)
        else:
            model.all_tied_weights_keys.pop(tied)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)

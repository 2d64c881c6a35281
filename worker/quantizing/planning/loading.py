"""A target's model after loading, without its data: transformers' own loading code, run on traced tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qbatch.core.domain import DType
from qbatch.core.errors import JobError, SourceCorrupt, Unsupported
from qbatch.worker.methods.halves import weights_of
from qbatch.worker.methods.packing import Packing, StreamedPacking
from qbatch.worker.quantizing.planning.initializing import why_overwritten
from qbatch.worker.quantizing.planning.skeleton import Skeleton, build_skeleton
from qbatch.worker.quantizing.target import Target
from qbatch.worker.quantizing.tensors.source_reader import TORCH_DTYPES, SourceReader
from qbatch.worker.quantizing.tensors.trace import (
    Call,
    FromSource,
    Origin,
    QuantizedPart,
    Traced,
    simplified,
    sources_of,
    traced_tensors,
)


class NotStreamable(Exception):
    """This model cannot be quantized tensor by tensor; the whole of it must be built. ``str()`` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A tensor of the source (perhaps cast) that is quantized. ``shape`` is [rows, columns] as it is quantized;
    the source's is the other way round where ``transposed``. ``dtype`` is that of the values quantized."""

    name: str
    source: str
    transposed: bool
    shape: tuple[int, int]
    dtype: torch.dtype
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A target's model with traced tensors in place of weights, and what is to be quantized, by parameter name."""

    target: Target
    packing: StreamedPacking
    skeleton: Skeleton
    weights: Mapping[str, Weight]
    dropped: tuple[str, ...]


def trace_loading(source: Path, reader: SourceReader, target: Target, dtype: DType, device: str) -> TracedModel:
    """Load ``source`` without its data, except where only the values of two tensors say whether they are tied.

    Raises SourceCorrupt where a key is missing or has the wrong shape, Unsupported, NotStreamable.
    """
    skeleton = build_skeleton(source, target.scheme, dtype, device, trusted=target.trusted)
    model = skeleton.model
    packing = weights_of(target.scheme.description).streamed_packing(target.scheme)
    info, recorder = load_source(skeleton, packing, reader, dtype)
    _refuse_unquantized(skeleton, recorder, info)
    recorder.raise_if_refused()
    _refuse_misfits(info)
    dropped = unused(reader, model, recorder)
    overwritten = why_overwritten(model, info)
    _tie(model, info, reader)
    refuse_missing(info.missing_keys)
    # Last: what is wrong with a source need not wait until its whole model is built.
    recorder.raise_if_not_streamable()
    if overwritten is not None:
        raise NotStreamable(overwritten)
    return TracedModel(target=target, packing=packing, skeleton=skeleton, weights=recorder.weights, dropped=dropped)


def load_source(
    skeleton: Skeleton, packing: Packing, reader: SourceReader, dtype: DType
) -> tuple[Any, TracingQuantizer]:
    """``load_traced`` with the source's tensors, converted as transformers converts them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(skeleton.model, None, skeleton.quantizer)
    return load_traced(skeleton, packing, _traced_source(reader), mapping, dtype)


def load_traced(
    skeleton: Skeleton, packing: Packing, tensors: dict[str, Traced], mapping: list[Any], dtype: DType
) -> tuple[Any, TracingQuantizer]:
    """Put traced ``tensors`` into the skeleton's model, converted by transformers' ``mapping``. Returns its own report
    of what is missing, left over or misshapen, and what would be quantized."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    recorder = TracingQuantizer(skeleton, packing)
    needed = {name: tensor.shape for name, tensor in _all_tensors(skeleton.model)}
    torch_dtype = getattr(torch, dtype.value)
    info, _ = convert_and_load_state_dict_in_model(
        model=skeleton.model,
        state_dict=tensors,
        load_config=LoadStateDictConfig(
            device_map={"": "meta"},
            dtype=torch_dtype,
            dtype_plan=skeleton.model._get_dtype_plan(torch_dtype),
            hf_quantizer=recorder,
            weight_mapping=mapping,
        ),
        disk_offload_index=None,
    )
    # Before 5.23, transformers takes any shape where there is a quantizer.
    for name, tensor in traced_tensors(skeleton.model):
        if name not in recorder.origins and tensor.shape != needed[name]:
            info.mismatched_keys.add((name, tensor.shape, needed[name]))
    return info, recorder


def _all_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, a shared one under each of its names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _traced_source(reader: SourceReader) -> dict[str, Traced]:
    traced = {}
    for tensor in reader.tensors():
        if tensor.dtype not in TORCH_DTYPES:
            raise NotStreamable(f"{tensor.name} has dtype {tensor.dtype}")
        meta = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
        traced[tensor.name] = Traced.of(meta, FromSource(tensor.name))
    return traced


class TracingQuantizer:
    """Stands in for transformers' quantizer while loading: notes what would be quantized, and quantizes nothing.

    It refuses later, not at once: transformers swallows what is raised while it converts.
    """

    pre_quantized = False

    def __init__(self, skeleton: Skeleton, packing: Packing) -> None:
        self._skeleton = skeleton
        self._refusals: list[JobError] = []
        self._not_streamable: list[NotStreamable] = []
        self.packing = packing
        self.weights: dict[str, Weight] = {}
        self.origins: dict[str, tuple[Origin, bool]] = {}
        """Where every weight that would be quantized comes from, and whether it is transposed first."""

    def param_needs_quantization(self, model: Any, name: str) -> bool:
        if not self._skeleton.quantizer.param_needs_quantization(model, name):
            return False
        return self.packing.why_left(*model.get_parameter(name).shape) is None

    def get_quantize_ops(self) -> TracingQuantizer:
        return self

    def convert(self, tensors: dict[str, Any], *, model: Any, **_: Any) -> dict[str, torch.Tensor]:
        return {name: self._record(model, name, value) for name, value in tensors.items()}

    def _record(self, model: Any, name: str, value: Any) -> torch.Tensor:
        traced: Traced = value[0] if isinstance(value, list) else value
        module = model.get_submodule(name.rpartition(".")[0])
        # As the library's own operation does: nothing in such a module is initialized later.
        module._is_hf_initialized = self.packing.marks_initialized
        transposed = self.packing.is_transposed(module)
        needed = (module.out_features, module.in_features)
        found = tuple(traced.shape)[::-1] if transposed else tuple(traced.shape)
        origin = simplified(traced.origin)
        self.origins[name] = (origin, transposed)
        if found != needed:
            self._refusals.append(SourceCorrupt(f"{name} has {found} for its shape; the model needs {needed}"))
        elif isinstance(origin, Call | QuantizedPart):
            self._not_streamable.append(NotStreamable(f"{name} is converted and then quantized"))
        else:
            if (reason := self.packing.why_unfit(*needed)) is not None:
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


def traced_part(weight: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Traced:
    """The part ``key`` of a quantized weight, as a tensor without data."""
    return Traced.of(torch.empty(shape, dtype=dtype, device="meta"), QuantizedPart(weight, key))


def refuse_missing(keys: Any) -> None:
    """Raise SourceCorrupt where the source lacks keys: transformers would fill them with random numbers."""
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise SourceCorrupt(f"the source lacks {', '.join(names[:3])}{more}")


def _refuse_unquantized(skeleton: Skeleton, recorder: TracingQuantizer, info: Any) -> None:
    """transformers asks only about the first of the parameters that it cuts from one tensor whether it is quantized.
    The others would be written as they are, into layers that could not be loaded."""
    accounted_for = recorder.origins.keys() | info.missing_keys
    for name, _ in skeleton.model.named_parameters():
        if name not in accounted_for and recorder.param_needs_quantization(skeleton.model, name):
            raise Unsupported(f"{name} is cut from one tensor with a weight that is skipped: skip both, or neither")


def _refuse_misfits(info: Any) -> None:
    for name, found, needed in sorted(info.mismatched_keys):
        raise SourceCorrupt(f"{name} has {tuple(found)} for its shape; the model needs {tuple(needed)}")
    for name, text in sorted(info.conversion_errors.items()):
        raise NotStreamable(f"{name}: {text.strip().splitlines()[-1]}")


def unused(reader: SourceReader, model: Any, recorder: TracingQuantizer) -> tuple[str, ...]:
    """Names of the source's tensors that went into no parameter and no buffer of the traced ``model``.

    transformers' own list of unexpected keys has other names where keys were renamed, and leaves some out by pattern.
    """
    used = {name for origin, _ in recorder.origins.values() for name in sources_of(origin)}
    for _, tensor in traced_tensors(model):
        used |= sources_of(tensor.origin)
    return tuple(tensor.name for tensor in reader.tensors() if tensor.name not in used)


def _tie(model: Any, info: Any, reader: SourceReader) -> None:
    """Tie as ``from_pretrained`` does. Where the source holds both tensors of a pair, equal values decide, which
    transformers cannot see without data: so it is told that an equal one is missing, and of the others nothing."""
    for tied, kept in list(model.all_tied_weights_keys.items()):
        if tied in info.missing_keys or kept in info.missing_keys:
            continue
        if reader.same_values(model.get_parameter(tied).origin, model.get_parameter(kept).origin):
            info.missing_keys.add(tied)
        else:
            model.all_tied_weights_keys.pop(tied)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)

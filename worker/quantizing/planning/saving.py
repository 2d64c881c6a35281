"""Determines the contents of a target's files by running transformers' own saving code on traced tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_torch_storage_id, get_torch_storage_size, split_state_dict_into_shards_factory

from qbatch.core.errors import SourceCorrupt, one_line
from qbatch.worker.methods.packing import Packing
from qbatch.worker.quantizing.planning.loading import NotStreamable, TracedModel, Weight, traced_part
from qbatch.worker.quantizing.tensors.trace import Origin, QuantizedPart, TracedTensor, has_quantized_part, simplified

_DEFAULT_SHARD_SIZE = "50GB"  # transformers' own


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One tensor of the checkpoint. ``content`` is its bytes, or the origin to compute them from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Origin | bytes

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """A checkpoint's tensors in order, by file name. ``index`` is the text of the index, None for a single file."""

    files: Mapping[str, tuple[Output, ...]]
    index: str | None


def trace_saving(loaded: TracedModel, offsets: Mapping[str, float], device: str) -> Shards:
    """Divide the checkpoint into files. ``offsets`` are the means that double quantization subtracts, by parameter
    name; empty without double quantization.

    Raises NotStreamable if a tensor's content cannot be computed from the source.
    """
    model = loaded.skeleton.model
    state = quantized_state(model, loaded.packing, loaded.weights, offsets, device)
    state = as_saved(_without_tied(state, model), model)
    limit = loaded.target.scheme.max_shard_bytes
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=get_torch_storage_size,
        get_storage_id=_storage_id,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_DEFAULT_SHARD_SIZE if limit is None else limit,
    )
    files = {
        file: tuple(_output(name, state[name]) for name in names) for file, names in split.filename_to_tensors.items()
    }
    return Shards(files=files, index=_index(loaded, split) if split.is_sharded else None)


def quantized_state(
    model: Any, packing: Packing, weights: Mapping[str, Weight], offsets: Mapping[str, float], device: str
) -> dict[str, Any]:
    """The state dict of a loaded ``model`` under its own names, including the parts of the quantized ``weights``."""
    for name, weight in weights.items():
        part, offset = partial(traced_part, name), offsets.get(name)
        packing.attach_state(model.get_parameter(name), weight.shape, weight.dtype, offset, device, part)
    state: dict[str, Any] = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return packing.as_stored(state, {name: weight.shape for name, weight in weights.items()}, traced_part)


def as_saved(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """The state dict with the names and the order in which transformers saves it.

    If nothing was converted on loading, transformers' function only sorts, but compiles a regular expression for each
    tensor first. That would take half of the planning time, so this case sorts directly.
    """
    from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

    if getattr(model, "_weight_conversions", None) == []:
        return dict(sorted(state.items(), key=lambda item: dot_natural_key(item[0])))
    return dict(revert_weight_conversion(model, state))


def _without_tied(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """The state dict without tied duplicates. transformers recognizes duplicates among meta tensors by the model's
    parameters, so tensors that are neither parameters nor buffers bypass its function."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    beside = {name for name, tensor in state.items() if not _belongs_to_model(tensor)}
    kept = remove_tied_weights_from_state_dict({n: t for n, t in state.items() if n not in beside}, model)
    return {name: kept.get(name, tensor) for name, tensor in state.items() if name in beside or name in kept}


def _belongs_to_model(tensor: torch.Tensor) -> bool:
    if not isinstance(tensor, TracedTensor):
        return tensor.device.type == "meta"
    return not isinstance(tensor.origin, QuantizedPart) or tensor.origin.key == "weight"


def _storage_id(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()._cdata if tensor.device.type == "meta" else get_torch_storage_id(tensor)


def _output(name: str, tensor: torch.Tensor) -> Output:
    content: Origin | bytes
    if isinstance(tensor, TracedTensor):
        content = simplified(tensor.origin)
        if has_quantized_part(content) and not isinstance(content, QuantizedPart):
            raise NotStreamable(f"{name} is converted after it was quantized")
    elif tensor.device.type == "meta":
        raise NotStreamable(f"{name} is not in the source; transformers makes it up")
    else:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Output(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), content=content)


def _index(loaded: TracedModel, split: Any) -> str:
    metadata = {"total_parameters": _num_parameters(loaded), **split.metadata}
    index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _num_parameters(loaded: TracedModel) -> int:
    """The number of parameters as ``PreTrainedModel.num_parameters`` counts them."""
    total = 0
    for name, parameter in loaded.skeleton.model.named_parameters():
        packed = name in loaded.weights
        total += loaded.packing.counted_elements(parameter) if packed else parameter.numel()
    return total


def save_configs(loaded: TracedModel, source: Path) -> None:
    """Write config.json and, for a generative model, generation_config.json, as ``save_pretrained`` does.

    Raises SourceCorrupt if the source's generation_config.json is invalid.
    """
    model, folder = loaded.skeleton.model, loaded.target.folder
    model.hf_quantizer = loaded.skeleton.quantizer
    loaded.skeleton.quantizer.postprocess_model(model)
    model.config.dtype = str(model.dtype).split(".")[1]
    model.config.architectures = [type(model).__name__]
    if model.can_generate():
        try:
            read_generation_config(model, source)
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise SourceCorrupt(f"generation_config.json: {one_line(error)}") from error
    model.config.save_pretrained(folder)


def read_generation_config(model: Any, source: Path) -> None:
    """Give ``model`` the generation config that ``from_pretrained(source)`` would. Models with their own way of
    generating, such as SpeechT5, get none."""
    if not hasattr(model, "adjust_generation_fn"):
        return
    model.adjust_generation_fn(
        None,
        False,
        None,
        str(source),
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=None,
    )

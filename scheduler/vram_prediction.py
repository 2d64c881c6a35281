"""Predict how much GPU memory a job will need, from safetensors headers and config.json alone. Needs no torch.

The prediction only chooses the queue. If it is too low, the job runs out of memory and moves to a larger GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, DType, JobSpec, Protocol, Scheme, stored_dtype
from qbatch.core.kinds import FLOATS
from qbatch.core.output_size import is_likely_quantized
from qbatch.core.sources import Header, TensorInfo, source_dtype
from qbatch.core.vram_classes import ANY_CLASS_BYTES

# The CUDA context, the kernels of torch and of the method, and cuBLAS's workspaces.
_CONTEXT_BYTES = GIB
# Quantizing holds a few tensors and pinned buffers at a time, whatever the size of the model.
_QUANTIZING_BYTES = 2 * GIB
# The allocator rounds sizes up, and does not merge all the blocks that it has split.
_FRAGMENTATION = 1.05
# Copies of a window's logits: the model's, the baseline's, and the rows of each that are compared.
_LOGITS = 4
# Activations as wide as the widest layer: gate, up, their product, and copies in the dtype that a kernel needs.
_ACTIVATIONS = 6


def predicted_need(spec: JobSpec, headers: tuple[Header, ...], config: Mapping[str, Any]) -> int | None:
    """The bytes of memory that the GPU must exceed; None if any device will do.

    That is the case on a CPU, and if every VRAM class has enough.
    """
    if spec.device is DeviceKind.CPU:
        return None
    dtype = stored_dtype(spec.dtype, source_dtype(headers))
    tensors = [tensor for header in headers for tensor in header.tensors]
    need = memory_bytes(tensors, config, spec.loaded_scheme, dtype, spec.protocol.for_device(DeviceKind.CUDA))
    return need if need >= ANY_CLASS_BYTES else None


def memory_bytes(
    tensors: Iterable[TensorInfo], config: Mapping[str, Any], scheme: Scheme, dtype: DType, protocol: Protocol
) -> int:
    """Peak GPU memory in bytes while the model is quantized and measured by ``protocol``. ``dtype`` is not AUTO."""
    tensors = tuple(tensors)
    if not protocol.runs_model and (scheme.is_baseline or scheme.description.is_streamed):
        return 0 if scheme.is_baseline else _CONTEXT_BYTES + _QUANTIZING_BYTES
    text = _text_config(config)
    weights = sum(_loaded_bytes(tensor, text, scheme, dtype) for tensor in tensors)
    # While a tensor is being cast, a copy in the source's dtype exists too.
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    running = weights * _FRAGMENTATION + largest + _cache_bytes(text, dtype, protocol)
    values = _LOGITS * _size(text, "vocab_size") + _ACTIVATIONS * _widest(text)
    running += protocol.eval_window * values * _width(dtype)
    quantized = (tensor.numel for tensor in tensors if is_likely_quantized(tensor, text, scheme))
    running += scheme.description.working_bytes(max(quantized, default=0), scheme.options)
    return _CONTEXT_BYTES + round(running if scheme.is_baseline else max(running, _QUANTIZING_BYTES))


def _loaded_bytes(tensor: TensorInfo, config: Mapping[str, Any], scheme: Scheme, dtype: DType) -> float:
    if tensor.dtype not in FLOATS:
        return tensor.nbytes
    if not is_likely_quantized(tensor, config, scheme):
        return tensor.numel * _width(dtype)
    rows, columns = tensor.shape
    return scheme.description.loaded_bytes(rows, columns, scheme.options)


def _cache_bytes(config: Mapping[str, Any], dtype: DType, protocol: Protocol) -> int:
    """Bytes of the keys and values of all layers at the end of a generation; 0 if the config does not tell."""
    layers, hidden = _size(config, "num_hidden_layers", "n_layer"), _size(config, "hidden_size", "n_embd", "d_model")
    heads = _size(config, "num_attention_heads", "n_head")
    head_dim = _size(config, "head_dim") or (hidden // heads if heads else 0)
    kept = _size(config, "num_key_value_heads") or heads
    tokens = protocol.batch_size * (protocol.prompt_tokens + protocol.new_tokens)
    return 2 * layers * kept * head_dim * tokens * _width(dtype)


def _widest(config: Mapping[str, Any]) -> int:
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    return _size(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of these config values that is a positive integer, else 0; a config.json may contain anything."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _width(dtype: DType) -> int:
    return 4 if dtype is DType.FLOAT32 else 2

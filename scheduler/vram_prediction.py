"""What a job will need of a GPU's memory, predicted from safetensors headers and config.json alone. No torch.

A prediction only chooses the queue: where it is wrong, an out-of-memory error teaches better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, DType, JobSpec, Protocol, Scheme, stored_dtype
from qbatch.core.sources import Header, TensorInfo, source_dtype
from qbatch.models_db.vram import ANY_CLASS_BYTES

_FLOATS = ("F64", "F32", "F16", "BF16")
# The CUDA context, the kernels of torch and of the method, and cuBLAS's workspaces.
_CONTEXT_BYTES = GIB
# A quantizing pass holds a few tensors and its pinned ring, whatever the model's size.
_QUANTIZING_BYTES = 2 * GIB
# The allocator rounds up, and what it has split does not come together again.
_FRAGMENTATION = 1.05
# A window's logits: the model's, the base's, and the rows of each that are compared.
_LOGITS = 4
# Of a layer's widest: gate, up, their product, and their copies in what a kernel takes.
_ACTIVATIONS = 6


def predicted_need(spec: JobSpec, headers: tuple[Header, ...], config: Mapping[str, Any]) -> int | None:
    """Bytes of which a GPU must have more; None where any will do: on a CPU, or where it is less than every GPU has."""
    if spec.device is DeviceKind.CPU:
        return None
    dtype = stored_dtype(spec.dtype, source_dtype(headers))
    tensors = [tensor for header in headers for tensor in header.tensors]
    need = memory_bytes(tensors, config, spec.scheme, dtype, spec.protocol.for_device(DeviceKind.CUDA))
    return need if need >= ANY_CLASS_BYTES else None


def memory_bytes(
    tensors: Iterable[TensorInfo], config: Mapping[str, Any], scheme: Scheme, dtype: DType, protocol: Protocol
) -> int:
    """Peak bytes on the GPU while the model is quantized and measured by ``protocol``; ``dtype`` is resolved."""
    tensors = tuple(tensors)
    text = _text_config(config)
    weights = sum(_loaded_bytes(tensor, text, scheme, dtype) for tensor in tensors)
    # While it is cast, a tensor is there in the source's dtype too.
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    running = weights * _FRAGMENTATION + largest + _cache_bytes(text, dtype, protocol)
    values = _LOGITS * _size(text, "vocab_size") + _ACTIVATIONS * _widest(text)
    running += protocol.eval_window * values * _width(dtype)
    quantized = (tensor.numel for tensor in tensors if _is_quantized(tensor, text, scheme))
    running += scheme.description.working_bytes(max(quantized, default=0), scheme.options)
    return _CONTEXT_BYTES + round(running if scheme.is_baseline else max(running, _QUANTIZING_BYTES))


def _loaded_bytes(tensor: TensorInfo, config: Mapping[str, Any], scheme: Scheme, dtype: DType) -> float:
    if tensor.dtype not in _FLOATS:
        return tensor.nbytes
    if not _is_quantized(tensor, config, scheme):
        return tensor.numel * _width(dtype)
    rows, columns = tensor.shape
    return scheme.description.loaded_bytes(rows, columns, scheme.options)


def _is_quantized(tensor: TensorInfo, config: Mapping[str, Any], scheme: Scheme) -> bool:
    """As far as names and shapes tell: matrices, but for embeddings, heads, experts (which transformers fuses, and
    leaves at 16 bits) and what the user skips."""
    if scheme.is_baseline or len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return False
    left_alone = (".experts.", "embed", ".wte.", ".wpe.", *scheme.skip_modules)
    return _size(config, "vocab_size") not in tensor.shape and not any(part in tensor.name for part in left_alone)


def _cache_bytes(config: Mapping[str, Any], dtype: DType, protocol: Protocol) -> int:
    """The keys and values of every layer at the end of a generation; 0 where the config does not tell."""
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
    """The first of these that is a whole number above 0; a config.json may say anything."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _width(dtype: DType) -> int:
    return 4 if dtype is DType.FLOAT32 else 2

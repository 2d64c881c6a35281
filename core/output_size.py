"""How many bytes of weights a checkpoint will have, from headers and config.json alone. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qbatch.core.domain import Scheme, stored_dtype
from qbatch.core.kinds import FLOAT_NAMES, FLOATS, DType
from qbatch.core.known_layers import KNOWN, KnownLayers
from qbatch.core.safetensors_size import HEADER_ALIGNMENT, files_bytes, nbytes
from qbatch.core.sources import Header, TensorInfo, source_dtype
from qbatch.core.vocabulary import vocabulary_size


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSize:
    """``nbytes`` of safetensors files, at most ``off_by`` more or fewer; ``off_by`` None if they are only estimated.

    ``weights_bytes``: of the loaded weights, as a result counts them, without an adapter's. They are exact where
    the files are.
    """

    nbytes: int
    weights_bytes: int
    off_by: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor under the name that it is stored by. ``shape`` is [rows, columns] if it is quantized."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_quantized: bool


def output_size(headers: Sequence[Header], config: Mapping[str, Any], scheme: Scheme, asked: DType) -> OutputSize:
    """The size of the checkpoint that ``scheme``, which is no baseline, makes of a source, in the ``asked`` dtype.

    It is exact for architectures whose layers are known (``known_layers``): with double quantization, up to a few bytes
    for each quantized weight, which depend on the values. Of others it is judged by names which weights are quantized.
    Where the scheme makes an adapter, the size is that of the adapter alone.
    """
    tensors = [tensor for header in headers for tensor in header.tensors]
    dtype = stored_dtype(asked, source_dtype(tuple(headers)))
    exact = _exactly(tensors, config, scheme, dtype)
    stored = exact if exact is not None else list(_roughly(tensors, config, scheme, dtype))
    parts: dict[str, tuple[str, tuple[int, ...]]] = {}
    weights_bytes = 0
    columns: dict[str, int | None] = {}
    for tensor in stored:
        made = _parts(tensor, scheme, dtype)
        own = made if made is not None else {tensor.name: (tensor.dtype, tensor.shape)}
        parts |= own
        held = own if made is None else scheme.description.held_parts(made)
        weights_bytes += sum(nbytes(*part) for part in held.values())
        columns[tensor.name] = tensor.shape[1] if made is not None else None
    if scheme.recovery is not None:
        factors = _factors(stored, scheme.recovery.rank, FLOAT_NAMES[dtype])
        written = files_bytes(factors, {}, None)
        return OutputSize(nbytes=written, weights_bytes=weights_bytes, off_by=None if exact is None else 0)
    known = _known(config)
    if exact is not None and known is not None and known.head is not None:
        columns.setdefault(known.head, None)  # one that is tied is not stored, but mentioned
    metadata = scheme.description.stored_metadata(columns, dtype.value)
    # In which files the metadata of what belongs to several lie was not looked into.
    is_in_one_file = scheme.max_shard_bytes is None or not metadata
    is_exact = exact is not None and is_in_one_file and scheme.description.is_layout_known
    quantized = sum(count is not None for count in columns.values())
    varying = quantized * scheme.description.varying_bytes(scheme.options)
    may_vary = varying + HEADER_ALIGNMENT if varying else 0
    written = files_bytes(parts, metadata, scheme.max_shard_bytes)
    return OutputSize(nbytes=written, weights_bytes=weights_bytes, off_by=may_vary if is_exact else None)


def _factors(stored: Sequence[_Tensor], rank: int, dtype: str) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """The tensors of an adapter, as PEFT names them."""
    layers = [(tensor.name.removesuffix(".weight"), tensor.shape) for tensor in stored if tensor.is_quantized]
    return {
        f"base_model.model.{name}.lora_{letter}.weight": (dtype, factor)
        for name, (rows, columns) in layers
        for letter, factor in (("A", (rank, columns)), ("B", (rows, rank)))
    }


def _parts(tensor: _Tensor, scheme: Scheme, dtype: DType) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
    if not tensor.is_quantized:
        return None
    rows, columns = tensor.shape
    return scheme.description.stored_parts(tensor.name, rows, columns, scheme.options, dtype.value)


def _exactly(
    tensors: Sequence[TensorInfo], config: Mapping[str, Any], scheme: Scheme, dtype: DType
) -> list[_Tensor] | None:
    """Every tensor that is stored; None if that is not certain."""
    known = _known(config)
    if known is None or config.get("auto_map") or (known.is_transposed and not scheme.description.is_streamed):
        return None
    names = _loaded_names(tensors, known)
    if known.head in names.values() and config.get("tie_word_embeddings", known.ties) is not False:
        return None  # it is stored only if its values are not those of the embeddings
    stored = []
    for tensor in tensors:
        own = names[tensor.name]
        is_linear = known.linear.fullmatch(own) is not None
        if not is_linear and not known.others.fullmatch(own):
            if known.dropped.fullmatch(own):
                continue
            return None
        if is_linear and (len(tensor.shape) != 2 or tensor.dtype not in FLOATS):
            return None
        shape = tensor.shape[::-1] if is_linear and known.is_transposed else tensor.shape
        is_quantized = is_linear and not _is_skipped(own, scheme)
        shape = shape if is_quantized else tensor.shape
        stored.append(_Tensor(name=own, dtype=_cast(tensor, dtype), shape=shape, is_quantized=is_quantized))
    return stored


def _known(config: Mapping[str, Any]) -> KnownLayers | None:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return KNOWN.get(name) if isinstance(name, str) else None


def _loaded_names(tensors: Sequence[TensorInfo], known: KnownLayers) -> dict[str, str]:
    """The names by which transformers loads, and saves, the source's tensors. Those of a base model get the prefix."""
    is_base = not any(tensor.name.startswith(known.prefix) for tensor in tensors)
    return {
        tensor.name: f"{known.prefix}{tensor.name}" if is_base and tensor.name != known.head else tensor.name
        for tensor in tensors
    }


def _is_skipped(name: str, scheme: Scheme) -> bool:
    """Whether the user's patterns leave the layer out, matched as transformers does."""
    module = name.removesuffix(".weight")
    return any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern)
        for pattern in scheme.skip_modules
    )


def _roughly(
    tensors: Sequence[TensorInfo], config: Mapping[str, Any], scheme: Scheme, dtype: DType
) -> Iterator[_Tensor]:
    for tensor in tensors:
        is_quantized = tensor.dtype in FLOATS and is_likely_quantized(tensor, config, scheme)
        yield _Tensor(name=tensor.name, dtype=_cast(tensor, dtype), shape=tensor.shape, is_quantized=is_quantized)


def is_likely_quantized(tensor: TensorInfo, config: Mapping[str, Any], scheme: Scheme) -> bool:
    """Whether a tensor will be quantized, judging by its name and shape.

    Matrices are, except embeddings, heads, experts (which transformers fuses and leaves at 16 bits), and the modules
    that the user skips.
    """
    if scheme.is_baseline or len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
        return False
    left_alone = (".experts.", "embed", ".wte.", ".wpe.", *scheme.skip_modules)
    return vocabulary_size(config) not in tensor.shape and not any(part in tensor.name for part in left_alone)


def _cast(tensor: TensorInfo, dtype: DType) -> str:
    return FLOAT_NAMES[dtype] if tensor.dtype in FLOATS else tensor.dtype

"""Tensors without data that record how they were computed. transformers' own loading code runs on them first, and the
actual computation is done later, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_SAME_VALUES = frozenset(
    {torch.Tensor.detach, torch.Tensor.contiguous, torch.Tensor.requires_grad_, torch.Tensor.clone}
)


@dataclass(frozen=True, slots=True, eq=False)
class FromSource:
    """A tensor of the source, as stored."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Cast:
    """Another tensor's values, cast to ``dtype``."""

    of: Origin
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Result number ``index`` of a torch function; None if the function returns a single tensor."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedPart:
    """The part ``key`` ("weight", "absmax", "SCB" …) of the result of quantizing the parameter ``weight``."""

    weight: str
    key: str


Origin = FromSource | Cast | Call | QuantizedPart


class TracedTensor(torch.Tensor):
    """A meta tensor with an origin. Torch functions on it run on the meta device, and the result records the call."""

    origin: Origin

    @staticmethod
    def of(meta: torch.Tensor, origin: Origin) -> TracedTensor:
        traced = torch.Tensor._make_subclass(TracedTensor, meta)
        traced.origin = origin
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*_all_plain(args), **({} if kwargs is None else tree_map_only(TracedTensor, _plain, kwargs)))
        if isinstance(result, torch.Tensor):
            return TracedTensor.of(result, _origin(func, args, kwargs or {}, result))
        if isinstance(result, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in result):
            return tuple(
                TracedTensor.of(item, Call(func, args, kwargs or {}, index)) for index, item in enumerate(result)
            )
        return result


def traced_tensors(model: Any) -> list[tuple[str, TracedTensor]]:
    """The traced parameters and buffers of a model, each under one of its names."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor) for name, tensor in named if isinstance(tensor, TracedTensor)]


def _all_plain(args: tuple[Any, ...]) -> list[Any]:
    # Nearly all arguments are plain tensors and numbers. Calling tree_map_only for those would dominate tracing time.
    return [_plain(arg) if isinstance(arg, TracedTensor) else _plain_argument(arg) for arg in args]


def _plain_argument(arg: Any) -> Any:
    return tree_map_only(TracedTensor, _plain, arg) if _is_nested(arg) else arg


def _is_nested(arg: Any) -> bool:
    return isinstance(arg, (tuple, list, dict)) and type(arg) is not torch.Size


def _plain(traced: TracedTensor) -> torch.Tensor:
    return torch.Tensor._make_subclass(torch.Tensor, traced)


def _origin(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Origin:
    first = args[0] if args and isinstance(args[0], TracedTensor) else None
    if first is not None:
        if func in _SAME_VALUES or (func is torch.Tensor.__getitem__ and args[1] is ...):
            return first.origin
        if func is torch.Tensor.to:
            return first.origin if result.dtype == first.dtype else Cast(first.origin, result.dtype)
        if func is torch.Tensor.squeeze:
            return _squeezed(first, args[1:], kwargs) or Call(func, args, kwargs)
    return Call(func, args, kwargs)


def simplified(origin: Origin) -> Origin:
    """The origin with joins undone where the very same split follows, as when experts are fused on loading and taken
    apart again on saving."""
    if not isinstance(origin, Call) or origin.function is not torch.chunk or origin.index is None:
        return origin
    whole, count, dim = _chunk_arguments(origin)
    joined = simplified(whole.origin)
    if not isinstance(joined, Call) or joined.function is not torch.cat:
        return origin
    pieces, joined_dim = _join_arguments(joined)
    equal = len({piece.shape for piece in pieces}) == 1
    if not equal or len(pieces) != count or joined_dim % whole.dim() != dim % whole.dim():
        return origin
    return simplified(pieces[origin.index].origin)


def _squeezed(piece: TracedTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin | None:
    """squeeze(chunk(stack(tensors, dim), len(tensors), dim)[i], dim) is tensors[i]."""
    dim = args[0] if args else kwargs.get("dim")
    cut = piece.origin
    if not isinstance(cut, Call) or cut.function is not torch.chunk or cut.index is None:
        return None
    whole, count, cut_dim = _chunk_arguments(cut)
    stacked = simplified(whole.origin)
    if not isinstance(stacked, Call) or stacked.function is not torch.stack:
        return None
    pieces, stack_dim = _join_arguments(stacked)
    if len(pieces) != count or dim is None or len({axis % whole.dim() for axis in (dim, cut_dim, stack_dim)}) != 1:
        return None
    return simplified(pieces[cut.index].origin)


def _chunk_arguments(call: Call) -> tuple[TracedTensor, int, int]:
    values = dict(zip(("input", "chunks", "dim"), call.args, strict=False)) | call.kwargs
    return values["input"], values["chunks"], values.get("dim", 0)


def _join_arguments(call: Call) -> tuple[list[TracedTensor], int]:
    values = dict(zip(("tensors", "dim"), call.args, strict=False)) | call.kwargs
    return list(values["tensors"]), values.get("dim", 0)


def sources_of(origin: Origin) -> frozenset[str]:
    """The names of the source tensors that ``origin`` is made from."""
    if isinstance(origin, FromSource):
        return frozenset({origin.name})
    if isinstance(origin, Cast):
        return sources_of(origin.of)
    if isinstance(origin, QuantizedPart):
        return frozenset()
    names: set[str] = set()
    tree_map_only(TracedTensor, lambda traced: names.update(sources_of(traced.origin)), (origin.args, origin.kwargs))
    return frozenset(names)


Steps = tuple[str, *tuple[torch.dtype, ...]]
"""A tensor of the source by its name, and what it is cast to, in order."""


def elementwise_steps(origin: Origin) -> Steps | None:
    """How a tensor of the source becomes ``origin`` if only by casts, so that a piece of it needs only that piece of
    the source; else None."""
    if isinstance(origin, FromSource):
        return (origin.name,)
    if not isinstance(origin, Cast) or (steps := elementwise_steps(origin.of)) is None:
        return None
    return (*steps, origin.dtype)


def is_elementwise(origin: Origin) -> bool:
    """Whether it is a tensor of the source, perhaps cast."""
    return elementwise_steps(origin) is not None


def has_quantized_part(origin: Origin) -> bool:
    """Whether a quantized tensor went into it."""
    if isinstance(origin, Cast):
        return has_quantized_part(origin.of)
    if isinstance(origin, Call):
        results: list[bool] = []
        tree_map_only(
            TracedTensor, lambda t: results.append(has_quantized_part(t.origin)), (origin.args, origin.kwargs)
        )
        return any(results)
    return isinstance(origin, QuantizedPart)


def replay(origin: Origin, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Compute the tensor from the source's, which ``read`` gives by name."""
    if isinstance(origin, FromSource):
        return read(origin.name)
    if isinstance(origin, Cast):
        return replay(origin.of, read).to(origin.dtype)
    if isinstance(origin, QuantizedPart):
        raise TypeError(f"{origin.weight}: a quantized part cannot be replayed")
    args, kwargs = tree_map_only(TracedTensor, lambda traced: replay(traced.origin, read), (origin.args, origin.kwargs))
    result = origin.function(*args, **kwargs)
    value: torch.Tensor = result if origin.index is None else result[origin.index]
    return value

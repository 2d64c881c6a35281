"""The means that double quantization subtracts. They must be known before a file can be laid out: they are stored as
decimal text, whose length varies. So double quantization reads the source twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from qbatch.worker.methods.packing import StreamedPacking
from qbatch.worker.quantizing.planning.loading import TracedModel, Weight
from qbatch.worker.quantizing.streaming.pieces import as_quantized, cut, piece_step
from qbatch.worker.quantizing.streaming.workspace_pool import WorkspacePool
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.workspace import Workspace, piece_bytes

# Bounds what is held at once: a 64th of so many values, in float32.
_BATCH_VALUES = 2**30


class NestedPassFailed(Exception):
    """Finding the means failed; the cause says why."""


_Doubly = tuple[StreamedPacking, Weight]


def nested_offsets(
    loaded: Sequence[TracedModel], reader: SourceReader, device: str, while_waiting: Callable[[], None]
) -> dict[str, float]:
    """The mean block maximum of every weight that someone quantizes doubly, by parameter name.

    On CPU the mean of many values depends on the number of torch threads: it is taken by the calling thread, which
    has as many as it would have for ``from_pretrained``.
    """
    offsets: dict[str, float] = {}
    for batch in _batches(doubly_quantized(loaded)):
        maxima = {weight.name: torch.empty(_blocks(packing, weight), device=device) for packing, weight in batch}
        if error := WorkspacePool(device).run(_jobs(batch, reader, device, maxima), while_waiting):
            raise NestedPassFailed from error
        offsets |= {name: float(found.mean().item()) for name, found in maxima.items()}
    return offsets


def doubly_quantized(loaded: Sequence[TracedModel]) -> list[_Doubly]:
    """Each weight once, with the packing of one that takes it (all find the same maxima)."""
    found = {
        weight.name: (one.packing, weight) for one in loaded if one.packing.nested for weight in one.weights.values()
    }
    return list(found.values())


def _batches(weights: list[_Doubly]) -> Iterator[list[_Doubly]]:
    batch: list[_Doubly] = []
    for packing, weight in weights:
        batch.append((packing, weight))
        if sum(one.shape[0] * one.shape[1] for _, one in batch) >= _BATCH_VALUES:
            yield batch
            batch = []
    if batch:
        yield batch


def _blocks(packing: StreamedPacking, weight: Weight) -> int:
    return -(-weight.shape[0] * weight.shape[1] // packing.block)


def _jobs(
    batch: list[_Doubly], reader: SourceReader, device: str, maxima: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[Workspace], None]]:
    for packing, weight in batch:
        step = piece_step([packing], weight.shape[1], piece_bytes(device) // reader.itemsize(weight.source))
        for start, count in cut(weight, step):
            yield partial(_find, packing, weight, start, count, reader, maxima[weight.name])


def _find(
    packing: StreamedPacking,
    weight: Weight,
    start: int,
    count: int,
    reader: SourceReader,
    maxima: torch.Tensor,
    workspace: Workspace,
) -> None:
    host = reader.read_into(workspace.input, weight.source, start, count)
    with workspace.turn():
        found = packing.block_maxima(as_quantized(workspace.to_device(host), weight))
        first = start // packing.block
        maxima[first : first + len(found)] = found
    workspace.wait()

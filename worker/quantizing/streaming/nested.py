"""Computes the means that double quantization subtracts from the block maxima.

They must be known before a file can be laid out, because they are stored as decimal text, whose length varies. For
this reason double quantization reads the source twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from qbatch.worker.methods.packing import StreamedPacking
from qbatch.worker.quantizing.planning.loading import TracedModel, Weight
from qbatch.worker.quantizing.streaming.pieces import cut, piece_step, values_to_quantize
from qbatch.worker.quantizing.streaming.workspace_pool import WorkspacePool
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.workspace import Workspace, piece_bytes

# Limits memory: the maxima held at once are one float32 for every 64 of these values.
_BATCH_VALUES = 2**30


class NestedPassFailed(Exception):
    """Computing the means failed; ``__cause__`` is the original error."""


_NestedWeight = tuple[StreamedPacking, Weight]


def nested_offsets(
    loaded: Sequence[TracedModel], reader: SourceReader, device: str, while_waiting: Callable[[], None]
) -> dict[str, float]:
    """The mean block maximum of every weight to which any target applies double quantization, by parameter name.

    On a CPU, the mean of many values depends on the number of torch threads. It is computed in the calling thread,
    which has as many as it would have for ``from_pretrained``. Raises NestedPassFailed, and what ``while_waiting``
    raises.
    """
    offsets: dict[str, float] = {}
    for batch in _batches(doubly_quantized(loaded)):
        maxima = {weight.name: torch.empty(_blocks(packing, weight), device=device) for packing, weight in batch}
        if error := WorkspacePool(device).run(_work(batch, reader, device, maxima), while_waiting):
            raise NestedPassFailed from error
        offsets |= {name: float(block_maxima.mean().item()) for name, block_maxima in maxima.items()}
    return offsets


def doubly_quantized(loaded: Sequence[TracedModel]) -> list[_NestedWeight]:
    """Each weight with double quantization once, with the packing of one of its targets: all give the same maxima."""
    by_name = {
        weight.name: (model.packing, weight)
        for model in loaded
        if model.packing.nested
        for weight in model.weights.values()
    }
    return list(by_name.values())


def _batches(weights: list[_NestedWeight]) -> Iterator[list[_NestedWeight]]:
    batch: list[_NestedWeight] = []
    for packing, weight in weights:
        batch.append((packing, weight))
        if sum(each.shape[0] * each.shape[1] for _, each in batch) >= _BATCH_VALUES:
            yield batch
            batch = []
    if batch:
        yield batch


def _blocks(packing: StreamedPacking, weight: Weight) -> int:
    return -(-weight.shape[0] * weight.shape[1] // packing.block)


def _work(
    batch: list[_NestedWeight], reader: SourceReader, device: str, maxima: Mapping[str, torch.Tensor]
) -> Iterator[Callable[[Workspace], None]]:
    for packing, weight in batch:
        step = piece_step([packing], weight.shape[1], piece_bytes(device) // reader.itemsize(weight.source))
        for start, count in cut(weight, step):
            yield partial(_compute_maxima, packing, weight, start, count, reader, maxima[weight.name])


def _compute_maxima(
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
        piece_maxima = packing.block_maxima(values_to_quantize(workspace.to_device(host), weight))
        first = start // packing.block
        maxima[first : first + len(piece_maxima)] = piece_maxima
    workspace.wait()

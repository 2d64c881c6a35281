"""Divides the work of one pass over a source into jobs that any thread can do in any order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

import torch

from qbatch.worker.methods.packing import StreamedPacking
from qbatch.worker.quantizing.planning.audit import is_finite
from qbatch.worker.quantizing.planning.loading import Weight
from qbatch.worker.quantizing.planning.saving import Output
from qbatch.worker.quantizing.streaming.target_writer import TargetWriter
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.trace import Origin, QuantizedPart, Steps, elementwise_steps, replay, sources_of
from qbatch.worker.quantizing.tensors.workspace import Workspace, as_bytes, host_view


class QuantizedPiece(NamedTuple):
    """A quantized piece for one target. Its bytes are valid after the workspace's ``wait``."""

    target_writer: TargetWriter
    weight: Weight
    first_value: int
    parts: dict[str, torch.Tensor]
    figures: torch.Tensor

    def write(self) -> None:
        for key, part in self.parts.items():
            self.target_writer.write_part(self.weight, key, host_view(part), self.first_value)
        self.target_writer.add_figures(self.weight, self.figures.view(torch.float64).tolist())


Consumers = tuple[tuple[TargetWriter, Weight], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePiece:
    """Quantizes values [start, start + count) of one source tensor for all its ``consumers``, ``step`` values at a
    time."""

    consumers: Consumers
    start: int
    count: int
    step: int

    def run(self, workspace: Workspace, reader: SourceReader) -> None:
        weight = self.consumers[0][1]
        if all(target_writer.error is not None for target_writer, _ in self.consumers):
            return
        host = reader.read_into(workspace.input, weight.source, self.start, self.count)
        staged = self._quantize(workspace, host)
        workspace.wait()
        for piece in staged:
            piece.write()

    def _quantize(self, workspace: Workspace, host: torch.Tensor) -> list[QuantizedPiece]:
        with workspace.turn():
            values = values_to_quantize(workspace.to_device(host), self.consumers[0][1])
            steps = range(0, len(values), self.step)
            return [piece for first in steps for piece in self._pack(workspace, values, first)]

    def _pack(self, workspace: Workspace, values: torch.Tensor, first: int) -> Iterator[QuantizedPiece]:
        piece = values[first : first + self.step]
        for target_writer, weight in self.consumers:
            if target_writer.error is not None:
                continue
            packing = target_writer.loaded.packing
            try:
                packed = packing.pack(piece, weight.shape[1], target_writer.offsets.get(weight.name))
                parts = {key: workspace.stage(part) for key, part in packed.parts.items()}
                yield QuantizedPiece(target_writer, weight, self.start + first, parts, workspace.stage(packed.figures))
            except Exception as error:
                target_writer.fail(error)


def values_to_quantize(values: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Convert a piece of the source, flat, to the flat values to quantize: cast, and transposed if the weight is."""
    values = replay(weight.origin, lambda _: values)
    return values.view(weight.shape[::-1]).t().reshape(-1) if weight.transposed else values


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPiece:
    """Copies values [start, start + count) of a source tensor, possibly cast, to every output with those values."""

    outputs: tuple[tuple[TargetWriter, Output], ...]
    origin: Origin
    start: int
    count: int

    def run(self, workspace: Workspace, reader: SourceReader) -> None:
        if all(target_writer.error is not None for target_writer, _ in self.outputs):
            return

        def read(name: str) -> torch.Tensor:
            return reader.read_into(workspace.input, name, self.start, self.count)

        values = replay(self.origin, read)
        data, finite = host_view(as_bytes(values)), is_finite(values)
        for target_writer, output in self.outputs:
            target_writer.write(output.name, data, self.start * output.dtype.itemsize)
            if not finite:
                target_writer.note_not_finite(output.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOutput:
    """Computes a whole output from one or several source tensors, with transformers' conversions."""

    target_writer: TargetWriter
    output: Output
    origin: Origin

    def run(self, _workspace: Workspace, reader: SourceReader) -> None:
        values = replay(self.origin, reader.whole)
        self.target_writer.write(self.output.name, host_view(as_bytes(values)), 0)
        if not is_finite(values):
            self.target_writer.note_not_finite(self.output.name)


WorkItem = QuantizePiece | CopyPiece | BuildOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copies:
    """The outputs that are copies of one source tensor, all cast in the same way."""

    outputs: tuple[tuple[TargetWriter, Output], ...]
    origin: Origin


_Group = Consumers | _Copies | BuildOutput


def planned_read_bytes(target_writers: Sequence[TargetWriter], reader: SourceReader) -> int:
    """The total number of bytes that the jobs of ``plan_work`` will read."""
    return sum(reader.info(name).nbytes for group in _groups(target_writers) for name in _sources(group))


def plan_work(target_writers: Sequence[TargetWriter], reader: SourceReader, piece_bytes: int) -> Iterator[WorkItem]:
    """All jobs of the pass, in the order of the source's tensors on disk. ``piece_bytes`` is the size that is read at
    a time, where the quantization allows it."""
    for group in sorted(_groups(target_writers), key=lambda group: reader.position(min(_sources(group)))):
        if isinstance(group, tuple):
            yield from _quantize_pieces(group, reader, piece_bytes)
        elif isinstance(group, _Copies):
            yield from _copy_pieces(group, reader, piece_bytes)
        else:
            yield group


def _groups(target_writers: Sequence[TargetWriter]) -> list[_Group]:
    return [*_quantize_groups(target_writers), *_other_groups(target_writers)]


def _sources(group: _Group) -> frozenset[str]:
    return frozenset({group[0][1].source}) if isinstance(group, tuple) else sources_of(group.origin)


def _quantize_groups(target_writers: Sequence[TargetWriter]) -> list[Consumers]:
    """Group the targets that quantize the same source tensor, so that it is read only once."""
    groups: dict[tuple[str, bool, torch.dtype], list[tuple[TargetWriter, Weight]]] = defaultdict(list)
    for target_writer in target_writers:
        for weight in target_writer.loaded.weights.values():
            groups[weight.source, weight.transposed, weight.dtype].append((target_writer, weight))
    return [tuple(group) for group in groups.values()]


def _other_groups(target_writers: Sequence[TargetWriter]) -> Iterator[_Copies | BuildOutput]:
    """The unquantized outputs. Outputs that copy the same source tensor are grouped, so that it is read only once."""
    copies: dict[Steps, list[tuple[TargetWriter, Output]]] = defaultdict(list)
    origins: dict[Steps, Origin] = {}
    for target_writer in target_writers:
        for output in target_writer.outputs():
            origin = output.content
            if isinstance(origin, bytes | QuantizedPart) or not output.nbytes:
                continue
            steps = elementwise_steps(origin)
            if steps is None:
                yield BuildOutput(target_writer=target_writer, output=output, origin=origin)
            else:
                copies[steps].append((target_writer, output))
                origins[steps] = origin
    for steps, outputs in copies.items():
        yield _Copies(outputs=tuple(outputs), origin=origins[steps])


def _quantize_pieces(consumers: Consumers, reader: SourceReader, piece_bytes: int) -> Iterator[QuantizePiece]:
    weight = consumers[0][1]
    packings = [target_writer.loaded.packing for target_writer, _ in consumers]
    step = piece_step(packings, weight.shape[1], piece_bytes // reader.itemsize(weight.source))
    for start, count in cut(weight, step):
        yield QuantizePiece(consumers=consumers, start=start, count=count, step=step)


def cut(weight: Weight, step: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the pieces in which a weight's source is read. A transposed weight is read in one piece."""
    values = weight.shape[0] * weight.shape[1]
    length = values if weight.transposed else step
    return ((start, min(length, values - start)) for start in range(0, values, length))


def piece_step(packings: Sequence[StreamedPacking], columns: int, max_values: int) -> int:
    """How many values to quantize at once: a multiple of what every packing can quantize independently, at most
    ``max_values`` if at least one such unit fits."""
    unit = lcm(*(packing.unit(columns) for packing in packings))
    return unit * max(1, max_values // unit)


def _copy_pieces(copies: _Copies, reader: SourceReader, piece_bytes: int) -> Iterator[CopyPiece]:
    (source,) = sources_of(copies.origin)
    numel = reader.info(source).numel
    step = piece_bytes // reader.itemsize(source)
    for start in range(0, numel, step):
        count = min(step, numel - start)
        yield CopyPiece(outputs=copies.outputs, origin=copies.origin, start=start, count=count)

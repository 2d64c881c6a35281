"""Writes several targets in one pass over the source, with memory use that does not grow with the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qbatch.worker.files.staging import require_space
from qbatch.worker.methods.packing import load_kernels
from qbatch.worker.quantizing.faults import as_job_error
from qbatch.worker.quantizing.meter import Meter
from qbatch.worker.quantizing.planning.audit import coverage
from qbatch.worker.quantizing.planning.loading import NotStreamable, TracedModel
from qbatch.worker.quantizing.planning.saving import save_configs, trace_saving
from qbatch.worker.quantizing.planning.space import weights_bytes
from qbatch.worker.quantizing.streaming.nested import NestedPassFailed, doubly_quantized, nested_offsets
from qbatch.worker.quantizing.streaming.pieces import plan_work, planned_read_bytes
from qbatch.worker.quantizing.streaming.target_writer import TargetWriter
from qbatch.worker.quantizing.streaming.workspace_pool import WorkspacePool
from qbatch.worker.quantizing.target import Deferred, Outcome, Refused, Written
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.workspace import piece_bytes, writers_per_file


def stream(
    source: Path, loaded: Sequence[TracedModel], reader: SourceReader, device: str, meter: Meter
) -> list[Outcome]:
    """Write every target whose loading was traced. If one target fails, the others continue.

    Raises only what reporting progress raises. ``quantize_s`` of the results is the time of the whole shared pass.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    target_writers: list[TargetWriter] = []
    try:
        with ThreadPoolExecutor(1) as background:
            # Errors are ignored here: they occur again in the pass, and are reported there.
            background.submit(load_kernels, device, [model.packing for model in loaded])
            # Double quantization reads the source, and reports progress, before the pass itself can be planned.
            expected = _expected_bytes(loaded, reader)
            meter.plan(expected)
            outcomes = _open_writers(source, loaded, reader, device, meter, target_writers)
        meter.plan(planned_read_bytes(target_writers, reader) - expected)
        work = (partial(item.run, reader=reader) for item in plan_work(target_writers, reader, piece_bytes(device)))
        error = WorkspacePool(device).run(work, meter.report)
        meter.report()
        if error is not None:
            for target_writer in target_writers:
                target_writer.fail(error)
        elapsed_s = time.perf_counter() - start
        return outcomes + [_outcome(target_writer, len(target_writers), elapsed_s) for target_writer in target_writers]
    finally:
        for target_writer in target_writers:
            target_writer.close()
        # Workspaces set the number of torch threads for their own thread, which also changes the default of new ones.
        torch.set_num_threads(threads)
        _release_memory(device)


def _expected_bytes(loaded: Sequence[TracedModel], reader: SourceReader) -> int:
    """Roughly how many bytes the pass will read and write."""
    read = sum(tensor.nbytes for tensor in reader.tensors())
    return read + sum(int(parameter.nbytes) for model in loaded for parameter in model.skeleton.model.parameters())


def _open_writers(
    source: Path,
    loaded: Sequence[TracedModel],
    reader: SourceReader,
    device: str,
    meter: Meter,
    target_writers: list[TargetWriter],
) -> list[Outcome]:
    """Add a writer to ``target_writers`` for each target that can be streamed. Return the outcomes of the others."""
    loaded, outcomes = _with_disk_space(loaded)
    meter.plan(sum(reader.info(weight.source).nbytes for _, weight in doubly_quantized(loaded)))
    try:
        offsets = nested_offsets(loaded, reader, device, meter.report)
    except NestedPassFailed as failure:
        error = as_job_error(failure.__cause__ or failure)
        outcomes += [Refused(target=model.target, error=error) for model in loaded if model.packing.nested]
        loaded, offsets = [model for model in loaded if not model.packing.nested], {}
    for model in loaded:
        try:
            reserved_bytes = sum(target_writer.unwritten_bytes() for target_writer in target_writers)
            target_writers.append(_open_writer(source, model, offsets, device, meter, reserved_bytes))
        except NotStreamable as error:
            outcomes.append(Deferred(target=model.target, reason=str(error)))
        except Exception as error:
            outcomes.append(Refused(target=model.target, error=as_job_error(error)))
    return outcomes


def _with_disk_space(loaded: Sequence[TracedModel]) -> tuple[list[TracedModel], list[Outcome]]:
    """Divide the targets into those that fit on the disk together, and the outcomes of those that do not.

    This check is approximate but early: with double quantization, the exact size is known only after the source was
    read once.
    """
    fitting: list[TracedModel] = []
    outcomes: list[Outcome] = []
    reserved_bytes = 0
    for model in loaded:
        shapes = {name: weight.shape for name, weight in model.weights.items()}
        needed_bytes = weights_bytes(model.skeleton.model, model.packing, shapes) + model.target.beside_bytes
        try:
            require_space(model.target.folder, needed_bytes, reserved_bytes)
        except Exception as error:
            outcomes.append(Refused(target=model.target, error=as_job_error(error)))
            continue
        reserved_bytes += needed_bytes
        fitting.append(model)
    return fitting, outcomes


def _open_writer(
    source: Path, loaded: TracedModel, offsets: Mapping[str, float], device: str, meter: Meter, reserved_bytes: int
) -> TargetWriter:
    target_offsets = offsets if loaded.packing.nested else {}
    shards = trace_saving(loaded, target_offsets, device)
    save_configs(loaded, source)
    target_writer = TargetWriter(loaded, shards, target_offsets, meter.wrote, writers_per_file(device), reserved_bytes)
    meter.plan(target_writer.size)
    return target_writer


def _outcome(target_writer: TargetWriter, shared_by: int, elapsed_s: float) -> Outcome:
    target = target_writer.loaded.target
    try:
        if target_writer.error is not None:
            raise target_writer.error
        files = target_writer.digests()
        audit = _audit(target_writer) | {"shared_pass": shared_by}
    except Exception as error:
        return Refused(target=target, error=as_job_error(error))
    return Written(target=target, quantize_s=elapsed_s, files=files, audit=audit, writer="stream")


def _audit(target_writer: TargetWriter) -> dict[str, Any]:
    loaded = target_writer.loaded
    quantized = {name: weight.shape[0] * weight.shape[1] for name, weight in loaded.weights.items()}
    weights_bytes = sum(output.nbytes for output in target_writer.outputs())
    return (
        coverage(loaded.skeleton, loaded.packing, loaded.skeleton.model, quantized, weights_bytes, loaded.dropped)
        | target_writer.error_audit()
    )


def _release_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        # torch caches pinned memory as well, and has no public function to release it.
        if release_pinned := getattr(torch._C, "_host_emptyCache", None):
            release_pinned()

"""One pass over a source that writes several targets at once, in memory that does not grow with the model."""

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
from qbatch.worker.quantizing.streaming.pieces import plan_jobs, planned_read_bytes
from qbatch.worker.quantizing.streaming.target_writer import TargetWriter
from qbatch.worker.quantizing.streaming.workspace_pool import WorkspacePool
from qbatch.worker.quantizing.target import Deferred, Outcome, Refused, Written
from qbatch.worker.quantizing.tensors.source_reader import SourceReader
from qbatch.worker.quantizing.tensors.workspace import piece_bytes, writers_per_file


def stream(
    source: Path, loaded: Sequence[TracedModel], reader: SourceReader, device: str, meter: Meter
) -> list[Outcome]:
    """Write every target whose loading was traced. One that fails leaves the others alone; nothing is raised but
    what the meter's reader raises. ``quantize_s`` is the time of the pass that they shared."""
    start = time.perf_counter()
    threads = torch.get_num_threads()
    target_writers: list[TargetWriter] = []
    try:
        with ThreadPoolExecutor(1) as beside:
            # What fails here fails again in the pass, and is reported there.
            beside.submit(load_kernels, device, [one.packing for one in loaded])
            # Double quantization reads, and reports, before the pass itself can be planned.
            expected = _expected_bytes(loaded, reader)
            meter.plan(expected)
            outcomes = _open_sinks(source, loaded, reader, device, meter, target_writers)
        meter.plan(planned_read_bytes(target_writers, reader) - expected)
        jobs = (partial(job.run, reader=reader) for job in plan_jobs(target_writers, reader, piece_bytes(device)))
        error = WorkspacePool(device).run(jobs, meter.report)
        meter.report()
        if error is not None:
            for target_writer in target_writers:
                target_writer.fail(error)
        elapsed_s = time.perf_counter() - start
        return outcomes + [_finished(target_writer, len(target_writers), elapsed_s) for target_writer in target_writers]
    finally:
        for target_writer in target_writers:
            target_writer.close()
        # Lanes set it for themselves, which also changes what threads yet to come begin with.
        torch.set_num_threads(threads)
        _give_back_memory(device)


def _expected_bytes(loaded: Sequence[TracedModel], reader: SourceReader) -> int:
    """What the pass will read and write, nearly."""
    read = sum(tensor.nbytes for tensor in reader.tensors())
    return read + sum(int(parameter.nbytes) for one in loaded for parameter in one.skeleton.model.parameters())


def _open_sinks(
    source: Path,
    loaded: Sequence[TracedModel],
    reader: SourceReader,
    device: str,
    meter: Meter,
    target_writers: list[TargetWriter],
) -> list[Outcome]:
    """Open a sink for each target that can have one, and say what becomes of the others."""
    loaded, outcomes = _with_room(loaded)
    meter.plan(sum(reader.info(weight.source).nbytes for _, weight in doubly_quantized(loaded)))
    try:
        offsets = nested_offsets(loaded, reader, device, meter.report)
    except NestedPassFailed as failure:
        error = as_job_error(failure.__cause__ or failure)
        outcomes += [Refused(target=one.target, error=error) for one in loaded if one.packing.nested]
        loaded, offsets = [one for one in loaded if not one.packing.nested], {}
    for one in loaded:
        try:
            owed_bytes = sum(target_writer.owed_bytes() for target_writer in target_writers)
            target_writers.append(_open_sink(source, one, offsets, device, meter, owed_bytes))
        except NotStreamable as reason:
            outcomes.append(Deferred(target=one.target, reason=str(reason)))
        except Exception as error:
            outcomes.append(Refused(target=one.target, error=as_job_error(error)))
    return outcomes


def _with_room(loaded: Sequence[TracedModel]) -> tuple[list[TracedModel], list[Outcome]]:
    """Those that the storage has room for, nearly, all of them together, and what becomes of the others: double
    quantization reads the source once before it is known to the byte."""
    fitting: list[TracedModel] = []
    outcomes: list[Outcome] = []
    owed_bytes = 0
    for one in loaded:
        shapes = {name: weight.shape for name, weight in one.weights.items()}
        needed_bytes = weights_bytes(one.skeleton.model, one.packing, shapes) + one.target.beside_bytes
        try:
            require_space(one.target.folder, needed_bytes, owed_bytes)
        except Exception as error:
            outcomes.append(Refused(target=one.target, error=as_job_error(error)))
            continue
        owed_bytes += needed_bytes
        fitting.append(one)
    return fitting, outcomes


def _open_sink(
    source: Path, loaded: TracedModel, offsets: Mapping[str, float], device: str, meter: Meter, owed_bytes: int
) -> TargetWriter:
    own = offsets if loaded.packing.nested else {}
    shards = trace_saving(loaded, own, device)
    save_configs(loaded, source)
    target_writer = TargetWriter(loaded, shards, own, meter.wrote, writers_per_file(device), owed_bytes)
    meter.plan(target_writer.size)
    return target_writer


def _finished(target_writer: TargetWriter, shared_by: int, elapsed_s: float) -> Outcome:
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
    return coverage(
        loaded.skeleton, loaded.packing, loaded.skeleton.model, quantized, weights_bytes, loaded.dropped
    ) | (target_writer.error_audit())


def _give_back_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        # Pinned memory is kept by torch as well; there is no public name for giving it back.
        if give_back := getattr(torch._C, "_host_emptyCache", None):
            give_back()

"""One pass over a source that writes several targets at once, in memory that does not grow with the model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from worker.quantize.audit import coverage
from worker.quantize.faults import as_job_error
from worker.quantize.jobs import plan_jobs, planned_read_bytes
from worker.quantize.lane import piece_bytes, writers_per_file
from worker.quantize.loading import Loaded, NotStreamable
from worker.quantize.meter import Meter
from worker.quantize.nested import NestedPassFailed, doubly_quantized, nested_offsets
from worker.quantize.packing import load_kernels
from worker.quantize.pool import LanePool
from worker.quantize.reading import SourceReader
from worker.quantize.room import weights_bytes
from worker.quantize.saving import save_configs, trace_saving
from worker.quantize.sink import Sink
from worker.quantize.target import Deferred, Outcome, Refused, Written
from worker.staging import require_room


def stream(source: Path, loaded: Sequence[Loaded], reader: SourceReader, device: str, meter: Meter) -> list[Outcome]:
    """Write every target whose loading was traced. One that fails leaves the others alone; nothing is raised but
    what the meter's reader raises. ``quantize_s`` is the time of the pass that they shared."""
    start = time.perf_counter()
    threads = torch.get_num_threads()
    sinks: list[Sink] = []
    try:
        with ThreadPoolExecutor(1) as beside:
            # What fails here fails again in the pass, and is reported there.
            beside.submit(load_kernels, device, [one.packing for one in loaded])
            # Double quantization reads, and reports, before the pass itself can be planned.
            expected = _expected_bytes(loaded, reader)
            meter.plan(expected)
            outcomes = _open_sinks(source, loaded, reader, device, meter, sinks)
        meter.plan(planned_read_bytes(sinks, reader) - expected)
        jobs = (partial(job.run, reader=reader) for job in plan_jobs(sinks, reader, piece_bytes(device)))
        error = LanePool(device).run(jobs, meter.report)
        meter.report()
        if error is not None:
            for sink in sinks:
                sink.fail(error)
        elapsed_s = time.perf_counter() - start
        return outcomes + [_finished(sink, len(sinks), elapsed_s) for sink in sinks]
    finally:
        for sink in sinks:
            sink.close()
        # Lanes set it for themselves, which also changes what threads yet to come begin with.
        torch.set_num_threads(threads)
        _give_back_memory(device)


def _expected_bytes(loaded: Sequence[Loaded], reader: SourceReader) -> int:
    """What the pass will read and write, nearly."""
    read = sum(tensor.nbytes for tensor in reader.tensors())
    return read + sum(int(parameter.nbytes) for one in loaded for parameter in one.skeleton.model.parameters())


def _open_sinks(
    source: Path, loaded: Sequence[Loaded], reader: SourceReader, device: str, meter: Meter, sinks: list[Sink]
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
            owed_bytes = sum(sink.owed_bytes() for sink in sinks)
            sinks.append(_open_sink(source, one, offsets, device, meter, owed_bytes))
        except NotStreamable as reason:
            outcomes.append(Deferred(target=one.target, reason=str(reason)))
        except Exception as error:
            outcomes.append(Refused(target=one.target, error=as_job_error(error)))
    return outcomes


def _with_room(loaded: Sequence[Loaded]) -> tuple[list[Loaded], list[Outcome]]:
    """Those that the storage has room for, nearly, all of them together, and what becomes of the others: double
    quantization reads the source once before it is known to the byte."""
    fitting: list[Loaded] = []
    outcomes: list[Outcome] = []
    owed_bytes = 0
    for one in loaded:
        shapes = {name: weight.shape for name, weight in one.weights.items()}
        needed_bytes = weights_bytes(one.skeleton.model, one.packing, shapes) + one.target.beside_bytes
        try:
            require_room(one.target.folder, needed_bytes, owed_bytes)
        except Exception as error:
            outcomes.append(Refused(target=one.target, error=as_job_error(error)))
            continue
        owed_bytes += needed_bytes
        fitting.append(one)
    return fitting, outcomes


def _open_sink(
    source: Path, loaded: Loaded, offsets: Mapping[str, float], device: str, meter: Meter, owed_bytes: int
) -> Sink:
    own = offsets if loaded.packing.nested else {}
    shards = trace_saving(loaded, own, device)
    save_configs(loaded, source)
    sink = Sink(loaded, shards, own, meter.wrote, writers_per_file(device), owed_bytes)
    meter.plan(sink.size)
    return sink


def _finished(sink: Sink, shared_by: int, elapsed_s: float) -> Outcome:
    target = sink.loaded.target
    try:
        if sink.error is not None:
            raise sink.error
        files = sink.digests()
        audit = _audit(sink) | {"shared_pass": shared_by}
    except Exception as error:
        return Refused(target=target, error=as_job_error(error))
    return Written(target=target, quantize_s=elapsed_s, files=files, audit=audit, writer="stream")


def _audit(sink: Sink) -> dict[str, Any]:
    loaded = sink.loaded
    quantized = {name: weight.shape[0] * weight.shape[1] for name, weight in loaded.weights.items()}
    weights_bytes = sum(output.nbytes for output in sink.outputs())
    return coverage(loaded.skeleton, loaded.skeleton.model, quantized, weights_bytes, loaded.dropped) | (
        sink.error_audit()
    )


def _give_back_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        # Pinned memory is kept by torch as well; there is no public name for giving it back.
        if give_back := getattr(torch._C, "_host_emptyCache", None):
            give_back()

"""Write every target of one source."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from models_db.domain import DType
from models_db.sources import Header
from worker.quantize.faults import as_job_error, quiet
from worker.quantize.loading import Loaded, NotStreamable, trace_loading
from worker.quantize.meter import Meter
from worker.quantize.reading import SourceReader
from worker.quantize.stream import Deferred, Outcome, stream
from worker.quantize.target import Progress, Refused, Target, Written
from worker.quantize.vet import vet_source
from worker.quantize.whole import write_whole


def write_checkpoints(
    source: Path, targets: Sequence[Target], *, dtype: DType, device: str, on_progress: Progress
) -> Iterator[Written | Refused]:
    """Quantize ``source`` (a local safetensors folder), reading it once for all targets.

    ``dtype`` is what stays unquantized; ``device`` is "cpu" or "cuda:0". A target that cannot be streamed is written
    the long way after the others. A source that is unfit refuses every target with the same error; a target that
    fails by itself leaves the others alone. Nothing is raised but what ``on_progress`` raises.
    """
    meter = Meter(on_progress)
    with quiet():
        outcomes = _stream(source, targets, dtype, device, meter)
    for outcome in outcomes:
        if isinstance(outcome, Deferred):
            yield _write_whole(source, outcome, dtype, device)
        else:
            yield outcome


def _stream(source: Path, targets: Sequence[Target], dtype: DType, device: str, meter: Meter) -> list[Outcome]:
    try:
        headers = vet_source(source)
        reader = SourceReader(headers, meter.read)
    except Exception as error:
        return [Refused(target=target, error=as_job_error(error)) for target in targets]
    with reader:
        traced = [_trace(source, headers, target, dtype, device, reader) for target in targets]
        loaded = [one for one in traced if isinstance(one, Loaded)]
        outcomes: list[Outcome] = [one for one in traced if not isinstance(one, Loaded)]
        outcomes += stream(source, loaded, reader, device, meter) if loaded else []
    return sorted(outcomes, key=lambda outcome: isinstance(outcome, Deferred))


def _trace(
    source: Path, headers: tuple[Header, ...], target: Target, dtype: DType, device: str, reader: SourceReader
) -> Loaded | Refused | Deferred:
    try:
        return trace_loading(source, headers, target, dtype, device, reader.same_values)
    except NotStreamable as reason:
        return Deferred(target=target, reason=str(reason))
    except Exception as error:
        return Refused(target=target, error=as_job_error(error))


def _write_whole(source: Path, deferred: Deferred, dtype: DType, device: str) -> Written | Refused:
    start = time.perf_counter()
    try:
        with quiet():
            files, audit = write_whole(source, deferred.target, dtype, device)
    except Exception as error:
        return Refused(target=deferred.target, error=as_job_error(error))
    elapsed_s = time.perf_counter() - start
    audit = dict(audit) | {"whole_model_because": deferred.reason}
    return Written(target=deferred.target, quantize_s=elapsed_s, files=files, audit=audit, writer="whole")

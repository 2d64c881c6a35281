"""Write every target of one source. Importing this imports neither torch nor bitsandbytes, whose import starts CUDA."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models_db.domain import DType
from worker.quantize.faults import as_job_error, quiet
from worker.quantize.meter import Meter
from worker.quantize.target import Deferred, Outcome, Progress, Refused, Target, Written
from worker.quantize.vet import vet_source
from worker.quantize.whole import write_whole

if TYPE_CHECKING:
    from worker.quantize.reading import SourceReader


def write_checkpoints(
    source: Path, targets: Sequence[Target], *, dtype: DType, device: str, on_progress: Progress
) -> Iterator[Written | Refused]:
    """Quantize ``source`` (a local safetensors folder), reading it once for all targets.

    ``dtype`` is what stays unquantized; ``device`` is "cpu" or "cuda:0". A target that cannot be streamed is written
    the long way after the others. A source that is unfit refuses every target with the same error; a target that
    fails by itself leaves the others alone. Nothing is raised but what ``on_progress`` raises.
    """
    with quiet():
        outcomes = _stream(source, targets, dtype, device, Meter(on_progress))
    for outcome in outcomes:
        if not isinstance(outcome, Deferred):
            yield outcome
    for outcome in outcomes:
        if isinstance(outcome, Deferred):
            yield _write_whole(source, outcome, dtype, device)


def _stream(source: Path, targets: Sequence[Target], dtype: DType, device: str, meter: Meter) -> list[Outcome]:
    from worker.quantize.reading import SourceReader

    try:
        reader = SourceReader(vet_source(source), meter.read)
    except Exception as error:
        return [Refused(target=target, error=as_job_error(error)) for target in targets]
    with reader:
        return _stream_from(reader, source, targets, dtype, device, meter)


def _stream_from(
    reader: SourceReader, source: Path, targets: Sequence[Target], dtype: DType, device: str, meter: Meter
) -> list[Outcome]:
    from worker.quantize.loading import Loaded, NotStreamable, trace_loading
    from worker.quantize.stream import stream

    outcomes: list[Outcome] = []
    loaded: list[Loaded] = []
    for target in targets:
        try:
            loaded.append(trace_loading(source, reader, target, dtype, device))
        except NotStreamable as reason:
            outcomes.append(Deferred(target=target, reason=str(reason)))
        except Exception as error:
            outcomes.append(Refused(target=target, error=as_job_error(error)))
    return outcomes + (stream(source, loaded, reader, device, meter) if loaded else [])


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

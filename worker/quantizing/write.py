"""Write all targets of one source. Importing this module does not import torch or bitsandbytes, which start CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qbatch.core.domain import DType
from qbatch.core.errors import JobError, one_line
from qbatch.core.prior_quantization import stale_quantization
from qbatch.core.source_checks import check_source
from qbatch.core.sources import Header, read_config
from qbatch.worker.quantizing.faults import as_job_error, quiet
from qbatch.worker.quantizing.meter import Meter
from qbatch.worker.quantizing.target import Deferred, Outcome, Progress, Refused, Target, Written

if TYPE_CHECKING:
    from qbatch.worker.quantizing.tensors.source_reader import SourceReader


def write_checkpoints(
    source: Path,
    targets: Sequence[Target],
    *,
    dtype: DType,
    device: str,
    on_progress: Progress,
    before_whole: Callable[[], None] = lambda: None,
) -> Iterator[Written | Refused]:
    """Quantize ``source`` (a local safetensors folder), reading it once for all targets.

    ``dtype`` is the dtype of tensors that stay unquantized; ``device`` is "cpu" or "cuda:0". Targets that cannot be
    streamed are written last, each by building its whole model; ``before_whole`` is called before each, to make room
    for it. If the source is unusable, every target is refused with the same error; if one target fails, the others
    continue. Raises only what ``on_progress`` and ``before_whole`` raise.
    """
    meter = Meter(on_progress)
    try:
        headers = check_source(source)
        stale = stale_quantization(read_config(source), headers)
    except Exception as error:
        yield from (Refused(target=target, error=as_job_error(error)) for target in targets)
        return
    with quiet():
        outcomes = _stream(headers, source, targets, dtype, device, meter)
    yield from (_with_note(outcome, stale) for outcome in outcomes if not isinstance(outcome, Deferred))
    deferred = [outcome for outcome in outcomes if isinstance(outcome, Deferred)]
    if deferred:
        written = _write_whole(headers, source, deferred, dtype, device, meter, before_whole)
        yield from (_with_note(outcome, stale) for outcome in written)


def _with_note(outcome: Written | Refused, stale: str | None) -> Written | Refused:
    """Note in the audit what the source's config says of a quantization that its weights do not have."""
    if stale is None or isinstance(outcome, Refused):
        return outcome
    return replace(outcome, audit={**outcome.audit, "stale_quantization": stale})


def _stream(
    headers: tuple[Header, ...], source: Path, targets: Sequence[Target], dtype: DType, device: str, meter: Meter
) -> list[Outcome]:
    from qbatch.worker.quantizing.tensors.source_reader import SourceReader

    try:
        reader = SourceReader(headers, meter.read)
    except Exception as error:
        return [Refused(target=target, error=as_job_error(error)) for target in targets]
    with reader:
        outcomes = _stream_from(reader, source, targets, dtype, device, meter)
    meter.drop_remaining()
    meter.report()
    return outcomes


def _stream_from(
    reader: SourceReader, source: Path, targets: Sequence[Target], dtype: DType, device: str, meter: Meter
) -> list[Outcome]:
    from qbatch.worker.methods.implementations import weights_of
    from qbatch.worker.quantizing.planning.loading import NotStreamable, TracedModel, trace_loading
    from qbatch.worker.quantizing.streaming.stream import stream

    outcomes: list[Outcome] = []
    loaded: list[TracedModel] = []
    for target in targets:
        weights = weights_of(target.scheme.description)
        if (reason := weights.why_whole) is not None:
            outcomes.append(Deferred(target=target, reason=reason))
            continue
        try:
            weights.quiet_import()
            loaded.append(trace_loading(source, reader, target, dtype, device))
        except NotStreamable as error:
            outcomes.append(Deferred(target=target, reason=str(error)))
        except Exception as error:
            # A model's own code may do things that tracing does not support.
            if target.trusted and not isinstance(error, JobError):
                outcomes.append(Deferred(target=target, reason=one_line(error)))
            else:
                outcomes.append(Refused(target=target, error=as_job_error(error)))
    meter.drop_remaining()  # comparing tied tensors has already read some bytes
    return outcomes + (stream(source, loaded, reader, device, meter) if loaded else [])


def _write_whole(
    headers: tuple[Header, ...],
    source: Path,
    deferred: list[Deferred],
    dtype: DType,
    device: str,
    meter: Meter,
    before_each: Callable[[], None],
) -> Iterator[Written | Refused]:
    """Write the deferred targets one at a time, since each needs memory for the whole model. All are planned first."""
    from qbatch.worker.quantizing.building.whole_model import WholeModel

    models: list[WholeModel] = []
    for each in deferred:
        try:
            with quiet():
                models.append(WholeModel(source, headers, each, dtype, device))
        except Exception as error:
            yield Refused(target=each.target, error=as_job_error(error))
    remaining_bytes = sum(model.planned_bytes() for model in models)
    meter.plan(remaining_bytes)
    for model in models:
        before_each()
        with quiet():
            outcome = model.write(meter)
        remaining_bytes -= model.planned_bytes()
        meter.drop_remaining()
        meter.plan(remaining_bytes)
        meter.report()
        yield outcome

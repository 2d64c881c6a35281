"""Write every target of one source."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from models_db.domain import DType
from worker.quantize.faults import as_job_error, quiet
from worker.quantize.target import Progress, Refused, Target, Written
from worker.quantize.vet import vet_source
from worker.quantize.whole import write_whole


def write_checkpoints(
    source: Path, targets: Sequence[Target], *, dtype: DType, device: str, on_progress: Progress
) -> Iterator[Written | Refused]:
    """Quantize ``source`` (a local safetensors folder) once for each target, in order.

    ``dtype`` is what stays unquantized; ``device`` is "cpu" or "cuda:0". A source that is unfit refuses every
    target with the same error; a target that fails by itself leaves the others alone. Nothing is raised but
    what ``on_progress`` raises.
    """
    try:
        source_bytes = sum(header.size for header in vet_source(source))
    except Exception as error:
        yield from (Refused(target=target, error=as_job_error(error)) for target in targets)
        return
    for number, target in enumerate(targets):
        yield _write_one(source, target, dtype, device)
        on_progress(source_bytes * (number + 1), 0, source_bytes * len(targets))


def _write_one(source: Path, target: Target, dtype: DType, device: str) -> Written | Refused:
    start = time.perf_counter()
    try:
        with quiet():
            files, audit = write_whole(source, target, dtype, device)
    except Exception as error:
        return Refused(target=target, error=as_job_error(error))
    return Written(target=target, quantize_s=time.perf_counter() - start, files=files, audit=audit, writer="whole")

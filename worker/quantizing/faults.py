"""The quantizer's seam: what other libraries raise in it becomes ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from qbatch.core.errors import (
    OUR_DEFECTS,
    DiskFull,
    InternalError,
    JobError,
    QuantizationError,
    SourceCorrupt,
    one_line,
)
from qbatch.core.filesystem import storage_fault
from qbatch.worker.machine.device_faults import device_fault


def as_job_error(error: BaseException) -> JobError:
    """The JobError that ``error`` means while quantizing. A JobError is returned as it is."""
    from safetensors import SafetensorError

    if isinstance(error, JobError):
        return error
    text = one_line(error)
    if kind := device_fault(error):
        return kind(text)
    if isinstance(error, OSError):
        return storage_fault(error)(text)
    if isinstance(error, SafetensorError):
        # safetensors reports a full disk in words alone: Os { code: 28, kind: StorageFull, … }
        return DiskFull(text) if "StorageFull" in text or "code: 28" in text else SourceCorrupt(text)
    if isinstance(error, OUR_DEFECTS):
        return InternalError(text)
    return QuantizationError(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and bitsandbytes' warnings and progress bars out of job logs. Not for several threads."""
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    bnb_logger = logging.getLogger("bitsandbytes")
    bnb_level = bnb_logger.level
    log.set_verbosity_error()
    log.disable_progress_bar()
    bnb_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        bnb_logger.setLevel(bnb_level)
        if bars:
            log.enable_progress_bar()

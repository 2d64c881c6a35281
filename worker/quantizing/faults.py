"""Turns the errors that other libraries raise while quantizing into JobErrors, and silences those libraries."""

from __future__ import annotations

import logging
import traceback
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
from qbatch.core.methods.registry import every_silenced_logger
from qbatch.worker.machine.device_faults import find_fault


def as_job_error(error: BaseException) -> JobError:
    """Convert an error raised while quantizing to a JobError. A JobError is returned unchanged.

    A defect and a fault of the device have the traceback as a note. Others may not: what a library says about a file or
    a network may contain the link of a download.
    """
    from safetensors import SafetensorError

    if isinstance(error, JobError):
        return error
    if fault := find_fault(error):
        return with_traceback_noted(fault.kind(one_line(fault.error)), error)
    text = one_line(error)
    if isinstance(error, OSError):
        return storage_fault(error)(text)
    if isinstance(error, SafetensorError):
        # safetensors reports a full disk only in the message: Os { code: 28, kind: StorageFull, … }
        return DiskFull(text) if "StorageFull" in text or "code: 28" in text else SourceCorrupt(text)
    if isinstance(error, OUR_DEFECTS):
        return with_traceback_noted(InternalError(text), error)
    return with_traceback_noted(QuantizationError(text), error)


def with_traceback_noted(translated: JobError, error: BaseException) -> JobError:
    """``translated`` with the traceback of ``error`` as a note: text, because frames would keep their tensors alive."""
    translated.add_note("".join(traceback.format_exception(error)).rstrip())
    return translated


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and progress bars of transformers and the methods' libraries out of job logs.

    Not thread-safe: it changes log levels and warning filters of the whole process.
    """
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    loggers = [logging.getLogger(library) for library in every_silenced_logger()]
    levels = [logger.level for logger in loggers]
    log.set_verbosity_error()
    log.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            log.enable_progress_bar()

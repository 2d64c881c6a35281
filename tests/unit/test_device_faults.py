"""What a model does to a sound device is the job's own fault; the runner leaves the device all the same."""

from __future__ import annotations

import pytest

from qbatch.core.errors import BenchmarkError, DeviceError, JobError, job_error
from qbatch.core.retry_policy import RULES, Again
from qbatch.worker.machine.device_faults import device_fault
from qbatch.worker.models.load import translated
from qbatch.worker.runner.messages import Failed
from qbatch.worker.runner.reports import Reports
from tests.bundles import Ear

_BY_MODEL = (
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`",
    "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`",
)
_BY_DEVICE = (
    "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "CUDA error: uncorrectable ECC error encountered",
)


def reported(text: str) -> tuple[list[JobError], tuple[int, ...]]:
    """What a worker hears of two jobs, the first of which ends in this error, and which of them are still open."""
    ear = Ear()
    reports = Reports(ear, [1, 2])
    with reports.failing([1]), translated(BenchmarkError, "measuring"):
        raise RuntimeError(text)
    failed = [message for message in ear.heard if isinstance(message, Failed)]
    return [job_error(message.kind, message.message) for message in failed], reports.open()


@pytest.mark.parametrize("text", _BY_MODEL)
def test_what_the_model_did_fails_its_job_and_the_runner_leaves(text: str) -> None:
    (error,), still_open = reported(text)
    assert (error.kind, RULES[error.kind].again) == ("benchmark_error", Again.NEVER)
    assert text in str(error)
    assert still_open == (), "the others have a new runner"


@pytest.mark.parametrize("text", _BY_DEVICE)
def test_what_the_device_did_is_tried_elsewhere(text: str) -> None:
    (error,), still_open = reported(text)
    assert (type(error), still_open) == (DeviceError, ())
    assert device_fault(RuntimeError(text)) is DeviceError


def test_a_fault_that_a_library_wraps_is_found() -> None:
    wrapped = ModuleNotFoundError("Could not import module 'replace_with_bnb_linear'")
    wrapped.__cause__ = RuntimeError("CUDA error: unspecified launch failure")
    assert device_fault(wrapped) is DeviceError
    wrapped.__cause__ = RuntimeError("no such file")
    assert device_fault(wrapped) is None

"""Request the kernels of a decode step: the client of ``qbatch.worker.measuring.why.decode_kernels``."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from dataclasses import asdict, replace
from types import TracebackType
from typing import IO, Any, Self

from qbatch.worker.measuring.why.decode_kernels import KernelsAlone, KernelsRequest, StepKernels
from qbatch.worker.measuring.why.profile import StepProfile

_TIME_LIMIT_S = 300.0
_END_S = 5.0


class Captures:
    """Captures and profiles decode steps in separate processes, which share their imports. A context manager.

    Leaving the context ends the processes. The first request waits for the imports, which take 15 s on some machines,
    unless ``prepare`` was called earlier.
    """

    def __init__(self, *, time_limit_s: float = _TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def prepare(self) -> subprocess.Popen[str]:
        """Start the imports. Nothing should be timed on the host meanwhile."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "qbatch.worker.measuring.why.decode_kernels"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # It forks, which is only safe with a single thread, so numpy must not start any.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        return self._server

    def kernels(self, request: KernelsRequest) -> list[StepKernels]:
        """Capture and profile a decode step at each shape of the request. Failures become reasons and never raise.

        The other process loads the model once more, so a GPU without enough memory for that is one such reason. If the
        capture fails, another process loads the model again for the profile.
        """
        captured = self._request(request)
        if all(one.profile is not None or one.reason is not None for one in captured):
            return captured
        profiled = self._request(replace(request, capture=False))
        return [replace(profile, alone=one.alone) for one, profile in zip(captured, profiled, strict=True)]

    def _request(self, request: KernelsRequest) -> list[StepKernels]:
        try:
            answer = self._ask(self.prepare(), json.dumps(asdict(request)))
        except TimeoutError as error:
            failed = StepKernels(alone=KernelsAlone(reason=str(error)), reason=str(error))
            return [failed] * len(request.shapes)
        if answer:
            return [_parsed(**fields) for fields in json.loads(answer)]
        reason = "the capturing process died; the job's log may say why"
        # If it died while capturing, profiling alone may still work.
        failed = StepKernels(alone=KernelsAlone(reason=reason), reason=None if request.capture else reason)
        return [failed] * len(request.shapes)

    def _ask(self, server: subprocess.Popen[str], line: str) -> str:
        """The answer, empty if the process died. Raises TimeoutError. A late or dead server is not used again."""
        requests, answers = _pipes(server)
        # A dead server also gives no answer, which is noticed below.
        with contextlib.suppress(BrokenPipeError):
            requests.write(line + "\n")
            requests.flush()
        if not select.select([answers], [], [], self._time_limit_s)[0]:
            self._end()
            raise TimeoutError(f"capturing took longer than {self._time_limit_s:.0f} s")
        answer = answers.readline()
        if not answer:
            self._end()
        return answer.strip()

    def _end(self) -> None:
        """End the server and any capture in progress, by closing its input."""
        server, self._server = self._server, None
        if server is None:
            return
        requests, answers = _pipes(server)
        with contextlib.suppress(BrokenPipeError):
            requests.close()
        try:
            server.wait(_END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        answers.close()


def _parsed(*, alone: Any, profile: Any, reason: str | None) -> StepKernels:
    return StepKernels(
        alone=None if alone is None else KernelsAlone(**alone),
        profile=None if profile is None else StepProfile(**profile),
        reason=reason,
    )


def _pipes(server: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert server.stdin is not None  # noqa: S101  (both are piped)
    assert server.stdout is not None  # noqa: S101
    return server.stdin, server.stdout

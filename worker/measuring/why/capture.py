"""Asks for the kernels of a decode step: the runner's end of ``qbatch.worker.measuring.why.decode_kernels``."""

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
    """Captures in processes of their own, which share their imports. A context: leaving it ends them.

    The first capture waits for the imports, 15 s on some machines, unless ``prepare`` was called meanwhile.
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
        """Begin with the imports; nothing should be timed on the host just then."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "qbatch.worker.measuring.why.decode_kernels"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # It forks, which is safe while it has one thread; numpy would start some that nobody needs.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        return self._server

    def kernels(self, request: KernelsRequest) -> list[StepKernels]:
        """Capture and profile a decode step at each of the request's shapes. Never raises for what goes wrong in there.

        The model is loaded in the other process: where the GPU has no room for that, that is the reason. A capture
        that fails costs another process, and another loading, for the profile.
        """
        found = self._answered(request)
        if all(one.profile is not None or one.reason is not None for one in found):
            return found
        again = self._answered(replace(request, capture=False))
        return [replace(other, alone=one.alone) for one, other in zip(found, again, strict=True)]

    def _answered(self, request: KernelsRequest) -> list[StepKernels]:
        try:
            answer = self._ask(self.prepare(), json.dumps(asdict(request)))
        except TimeoutError as late:
            nothing = StepKernels(alone=KernelsAlone(reason=str(late)), reason=str(late))
            return [nothing] * len(request.shapes)
        if answer:
            return [_parsed(**found) for found in json.loads(answer)]
        reason = "the capturing process died without a word; the job's log may say why"
        # It may be the capture that it died of.
        nothing = StepKernels(alone=KernelsAlone(reason=reason), reason=None if request.capture else reason)
        return [nothing] * len(request.shapes)

    def _ask(self, server: subprocess.Popen[str], line: str) -> str:
        """The answer, empty where a process died. A server that is late (TimeoutError) or gone is not asked again."""
        requests, answers = _pipes(server)
        # One that is gone has no answer either: that is how it is noticed.
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
        """Closing its input ends it, and a capture under way."""
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

"""Request the kernels of decode steps: the client of ``qbatch.worker.measuring.why.decode_kernels``."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import IO, Any, Self

from qbatch.worker.measuring.why.decode_kernels import (
    STARTED,
    Done,
    KernelsAlone,
    KernelsRequest,
    KernelsTask,
    StepKernels,
)
from qbatch.worker.measuring.why.profile import StepProfile

_TIME_LIMIT_S = 300.0
_END_S = 5.0
_DIED = "the capturing process died; the job's log may say why"


@dataclass(slots=True)
class _Progress:
    """What is known so far of a request, at each of its shapes; None if it is not known yet."""

    request: KernelsRequest
    alones: Sequence[KernelsAlone] | None = None
    profiles: Sequence[StepKernels] | None = None

    @property
    def task(self) -> KernelsTask:
        return KernelsTask(request=self.request, capture=self.alones is None, profile=self.profiles is None)

    @property
    def is_complete(self) -> bool:
        return self.alones is not None and self.profiles is not None

    def give_up_capture(self, reason: str) -> None:
        self.alones = [KernelsAlone(reason=reason)] * len(self.request.shapes)

    def give_up_profile(self, reason: str) -> None:
        self.profiles = [StepKernels(reason=reason)] * len(self.request.shapes)

    def kernels(self) -> list[StepKernels]:
        return [replace(one, alone=alone) for one, alone in zip(self.profiles or (), self.alones or (), strict=True)]


class Captures:
    """Captures and profiles decode steps in separate processes, which share their imports. A context manager.

    Leaving the context ends the processes. The first request waits for the imports, which take 15 s on some machines,
    unless ``prepare`` was called earlier.
    """

    def __init__(self, *, time_limit_s: float = _TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._server: subprocess.Popen[str] | None = None
        self._has_started = False
        self._is_asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def prepare(self) -> subprocess.Popen[str]:
        """Start the imports. Whatever is timed on the host meanwhile must be ``paused``."""
        if self._server is None:
            self._has_started = False
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "qbatch.worker.measuring.why.decode_kernels"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # It forks, which is only safe with a single thread, so numpy must not start any.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        return self._server

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which the imports stand still."""
        server = self._server
        if server is None or not self._await_start(server):
            yield
            return
        server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.send_signal(signal.SIGCONT)

    def kernels(self, requests: Sequence[KernelsRequest]) -> list[list[StepKernels]]:
        """Capture and profile a decode step of each model, at each shape of its request. Failures become reasons and
        never raise.

        One process does all of it, and loads each model once more, so a GPU without enough memory for that is one such
        reason. After a failed capture, another process does what is left.
        """
        found = [_Progress(request) for request in requests]
        for one in found:
            if one.request.not_captured is not None:
                one.give_up_capture(one.request.not_captured)
        while left := [one for one in found if not one.is_complete]:
            try:
                parts = self._ask(self.prepare(), [one.task for one in left])
            except TimeoutError as error:
                _give_up_all(left, str(error))
                break
            _take(left, parts)
        return [one.kernels() for one in found]

    def _ask(self, server: subprocess.Popen[str], tasks: Sequence[KernelsTask]) -> list[Done]:
        """The parts of the answer, as many as were made before the process ended. Raises TimeoutError. A late or dead
        server is not used again."""
        requests, answers = _pipes(server)
        # Before it is asked, so that no answer is read together with the first line.
        self._await_start(server)
        # A dead server also gives no answer, which is noticed below.
        with contextlib.suppress(BrokenPipeError):
            requests.write(json.dumps([asdict(task) for task in tasks]) + "\n")
            requests.flush()
        limit_s = self._time_limit_s * len(tasks)
        self._is_asked = True
        if not select.select([answers], [], [], limit_s)[0]:
            self._end()
            raise TimeoutError(f"capturing took longer than {limit_s:g} s")
        answer = answers.readline()
        self._is_asked = False
        if not answer:
            self._end()
            return []
        return [_done(**part) for part in json.loads(answer)]

    def _await_start(self, server: subprocess.Popen[str]) -> bool:
        """Wait until the server ends with this process. False if it does not start in time, or died."""
        _, answers = _pipes(server)
        if not self._has_started and select.select([answers], [], [], self._time_limit_s)[0]:
            self._has_started = answers.readline().strip() == STARTED
        return self._has_started

    def _end(self) -> None:
        """End the server and any capture in progress, by closing its input."""
        server, self._server = self._server, None
        if server is None:
            return
        requests, answers = _pipes(server)
        with contextlib.suppress(BrokenPipeError):
            requests.close()
        if not self._is_asked:
            server.kill()  # it may be in the middle of its imports
        self._is_asked = False
        try:
            server.wait(_END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        answers.close()


def _take(left: Sequence[_Progress], parts: Sequence[Done]) -> None:
    """Note the parts of an answer. If the process died, what it was doing is given up."""
    for part in parts:
        one = left[part.number]
        one.alones, one.profiles = part.alones or one.alones, part.profiles or one.profiles
    if parts and any(alone.step_s is None for alone in parts[-1].alones or ()):
        return  # it ended because that capture failed
    # In the order in which the process does it.
    for one in left:
        if one.alones is None:
            one.give_up_capture(_DIED)
            return
    for one in left:
        if one.profiles is None:
            one.give_up_profile(_DIED)
            return


def _give_up_all(left: Sequence[_Progress], reason: str) -> None:
    for one in left:
        if one.alones is None:
            one.give_up_capture(reason)
        if one.profiles is None:
            one.give_up_profile(reason)


def _done(*, number: int, alones: Any, profiles: Any) -> Done:
    return Done(
        number=number,
        alones=None if alones is None else [KernelsAlone(**alone) for alone in alones],
        profiles=None if profiles is None else [_profiled(**one) for one in profiles],
    )


def _profiled(*, profile: Any, reason: str | None, **_: Any) -> StepKernels:
    return StepKernels(profile=None if profile is None else StepProfile(**profile), reason=reason)


def _pipes(server: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert server.stdin is not None  # noqa: S101  (both are piped)
    assert server.stdout is not None  # noqa: S101
    return server.stdin, server.stdout

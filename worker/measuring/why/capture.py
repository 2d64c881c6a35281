"""Request the kernels of decode steps: the client of ``qbatch.worker.measuring.why.kernels_process``."""

from __future__ import annotations

import contextlib
import json
import select
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qbatch.worker.measuring.why.decode_kernels import (
    Done,
    KernelsAlone,
    KernelsRequest,
    KernelsTask,
    StepKernels,
)
from qbatch.worker.measuring.why.kernels_server import KernelsServer, start_server
from qbatch.worker.measuring.why.profile import StepProfile

_TIME_LIMIT_S = 300.0
_RELEASE_LIMIT_S = 30.0
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
    """Captures and profiles decode steps in another process. A context manager; leaving it ends that process.

    ``server``: the process, which the runner has forked. If that dies, or there is none, one is started anew, and the
    next request waits for its imports. ``log_path``: where libraries print to.
    """

    def __init__(
        self,
        server: KernelsServer | None = None,
        *,
        log_path: Path | None = None,
        time_limit_s: float = _TIME_LIMIT_S,
    ) -> None:
        self._server = server
        self._log_path = log_path
        self._time_limit_s = time_limit_s
        self._is_prepared = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        self._end()

    @property
    def server(self) -> KernelsServer:
        if self._server is None:
            self._server = start_server()
        return self._server

    def prepare(self, requests: Sequence[KernelsRequest]) -> None:
        """Let the process load the models of ``requests``, which ``kernels`` will be asked about. Returns at once."""
        self._send({"prepare": [asdict(request) for request in requests]})
        self._is_prepared = True

    def release(self) -> None:
        """Free the memory of models that were prepared, if they were not asked about."""
        if not self._is_prepared:
            return
        self._is_prepared = False
        self._send({"release": True})
        if not self._is_answered(_RELEASE_LIMIT_S) or not self.server.answers.readline():
            self._end()

    def kernels(self, requests: Sequence[KernelsRequest]) -> list[list[StepKernels]]:
        """Capture and profile a decode step of each model, at each shape of its request. Failures become reasons and
        never raise.

        One process does all of it, and loads each model once more, unless it was prepared, so a GPU without enough
        memory for that is one such reason. After a failed capture, another process does what is left.
        """
        found = [_Progress(request) for request in requests]
        for one in found:
            if one.request.not_captured is not None:
                one.give_up_capture(one.request.not_captured)
        while left := [one for one in found if not one.is_complete]:
            try:
                parts = self._ask([one.task for one in left])
            except TimeoutError as error:
                _give_up_all(left, str(error))
                break
            _take(left, parts)
        return [one.kernels() for one in found]

    def _ask(self, tasks: Sequence[KernelsTask]) -> list[Done]:
        """The parts of the answer, as many as were made before the process ended. Raises TimeoutError. A late or dead
        server is not used again."""
        self._send({"tasks": [asdict(task) for task in tasks]})
        self._is_prepared = False
        limit_s = self._time_limit_s * len(tasks)
        if not self._is_answered(limit_s):
            self._end()
            raise TimeoutError(f"capturing took longer than {limit_s:g} s")
        answer = self.server.answers.readline()
        if not answer:
            self._end()
            return []
        return [_done(**part) for part in json.loads(answer)]

    def _send(self, request: Mapping[str, Any]) -> None:
        server = self.server
        log_path = None if self._log_path is None else str(self._log_path)
        # A dead server gives no answer, which is noticed then.
        with contextlib.suppress(BrokenPipeError):
            server.requests.write(json.dumps({"log_path": log_path, **request}) + "\n")
            server.requests.flush()

    def _is_answered(self, limit_s: float) -> bool:
        return bool(select.select([self.server.answers], [], [], limit_s)[0])

    def _end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end()


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

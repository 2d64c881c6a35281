"""The process in which kernels of decode steps are measured: it takes requests from a runner, and answers them.

The process is separate because a failed capture leaves CUDA unusable, and a profiler leaves its process slower. It has
made its imports and never uses the GPU itself: for the models of a bundle it forks, since a forked process can still
initialise the GPU. That process may load them before it has anything to measure. Requests and answers are lines of
JSON; the client is ``qbatch.worker.measuring.why.capture``. The runner forks this process (``kernels_server``);
``python -P -m qbatch.worker.measuring.why.kernels_process`` is one by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from typing import IO, Any

from qbatch.scheduler.child_process import ORPHANED, end_with_parent
from qbatch.worker.machine.imports import COMPILER, MODEL_LIBRARIES, import_without_gpu
from qbatch.worker.machine.logs import log_to_stderr
from qbatch.worker.measuring.why.decode_kernels import KernelsRequest, KernelsTask, Models, Shape, measure_all

_BEGUN = "begun"
_PRELOAD = (*MODEL_LIBRARIES, *COMPILER, "qbatch.worker.models.load")


def main() -> None:
    """Serve requests on standard input until it ends."""
    end_with_parent()
    # What libraries print goes to the log rather than between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import_without_gpu(_PRELOAD)
    serve(sys.stdin, answers)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Handle requests until there are no more. The process must have a single thread.

    A request has one of these: ``prepare``, a list of KernelsRequest, whose models are loaded, and which has no answer;
    ``tasks``, a list of KernelsTask, whose answer is a list of Done; ``release``, whose answer is an empty list once
    the memory of what was prepared is free.
    """
    forked: _ForkedProcess | None = None
    while line := requests.readline():
        request = json.loads(line)
        if "release" in request:
            if forked is not None:
                forked.end()
            forked = None
            print("[]", file=answers, flush=True)
            continue
        forked = forked or _ForkedProcess(requests.fileno())
        forked.send(line)
        if "tasks" in request:
            answer = forked.answer()
            if answer is None:  # it ended while it prepared itself
                forked = _ForkedProcess(requests.fileno())
                forked.send(line)
                answer = forked.answer()
            forked = None
            print(json.dumps(answer or []), file=answers, flush=True)


class _ForkedProcess:
    """A fork of this process, which uses the GPU. It takes requests up to the first with tasks, with which it ends. It
    ends earlier if it cannot load what it is to prepare."""

    def __init__(self, requests: int) -> None:
        """``requests``: what ends with the runner."""
        for_orders, orders = os.pipe()
        answer, for_answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(orders)
            _handle_and_exit(for_orders, requests, for_answer)
        os.close(for_orders)
        os.close(for_answer)
        self._orders, self._answer = os.fdopen(orders, "w"), os.fdopen(answer)

    def send(self, line: str) -> None:
        # One that has died does not begin with the tasks.
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(line)
            self._orders.flush()

    def answer(self) -> list[Any] | None:
        """The parts of its answer to the tasks, as many as it sent before it ended; None if it had not begun."""
        parts = self._answer.read()
        self._close()
        # What follows the last newline was not written to its end.
        lines = [json.loads(part) for part in parts.split("\n")[:-1]]
        return lines[1:] if lines else None

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._close()

    def _close(self) -> None:
        os.waitpid(self._pid, 0)
        self._answer.close()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()


def _handle_and_exit(orders: int, requests: int, answer_to: int) -> None:
    """Handle requests in the forked process and exit, without interpreter shutdown, which broken CUDA may hang."""
    end_with_parent()
    threading.Thread(target=_exit_with_the_runner, args=(requests,), daemon=True).start()
    try:
        models = Models()
        with os.fdopen(orders) as lines:
            request = _next_request(lines)
            while "prepare" in request:
                if not models.prepare([_request(**fields) for fields in request["prepare"]]):
                    return
                request = _next_request(lines)
        with os.fdopen(answer_to, "w") as pipe:
            print(json.dumps(_BEGUN), file=pipe, flush=True)
            for done in measure_all([_task(**fields) for fields in request["tasks"]], models):
                print(json.dumps(asdict(done)), file=pipe, flush=True)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _next_request(lines: IO[str]) -> Any:
    request = json.loads(lines.readline())
    if request["log_path"] is not None:
        _print_into(request["log_path"])
    log_to_stderr()
    return request


def _print_into(log_path: str) -> None:
    """Let what libraries print go into the bundle's log: when this process was forked, there was none."""
    try:
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:  # it goes into the worker's log, like all that its runner prints then
        print(f"cannot open the log {log_path}: {error.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        return
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _task(*, request: Any, capture: bool, profile: bool) -> KernelsTask:
    return KernelsTask(request=_request(**request), capture=capture, profile=profile)


def _request(*, shapes: Any, **fields: Any) -> KernelsRequest:
    return KernelsRequest(shapes=tuple(Shape(**shape) for shape in shapes), **fields)


def _exit_with_the_runner(requests: int) -> None:
    """Wait for the runner, which holds the other end of the requests' pipe, to end; then exit and free the GPU."""
    poll = select.poll()
    poll.register(requests, 0)
    poll.poll()
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()

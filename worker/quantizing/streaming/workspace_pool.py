"""Runs jobs in several threads, each with its own workspace on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from qbatch.worker.quantizing.meter import REPORT_INTERVAL_S
from qbatch.worker.quantizing.tensors.workspace import Workspace, make_workspace, workspace_count


class WorkspacePool:
    """Threads with a workspace each, for one pass over the jobs."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(
        self, jobs: Iterable[Callable[[Workspace], None]], while_waiting: Callable[[], None]
    ) -> BaseException | None:
        """Run every job once. The calling thread calls ``while_waiting`` a few times a second; it may raise.

        The first exception of a job stops the pass: no new jobs start, those running finish, and the exception is
        returned.
        """
        remaining = iter(jobs)
        threads = [threading.Thread(target=self._work, args=(remaining,)) for _ in range(workspace_count(self._device))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(REPORT_INTERVAL_S)
                    while_waiting()
        except BaseException as error:
            self._stop(error)
            raise
        finally:
            for thread in threads:
                thread.join()
        return self._error

    def _work(self, remaining: Iterator[Callable[[Workspace], None]]) -> None:
        try:
            workspace = make_workspace(self._device)
            while (job := self._next(remaining)) is not None:
                job(workspace)
        except BaseException as error:
            self._stop(error)

    def _next(self, remaining: Iterator[Callable[[Workspace], None]]) -> Callable[[Workspace], None] | None:
        with self._lock:
            return None if self._error is not None else next(remaining, None)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error

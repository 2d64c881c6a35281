"""Run jobs on all lanes of a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from qbatch.worker.quantizing.meter import REPORT_INTERVAL_S
from qbatch.worker.quantizing.tensors.workspace import Workspace, make_workspace, workspace_count


class WorkspacePool:
    """Threads with a lane each, for one pass over the jobs."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(
        self, jobs: Iterable[Callable[[Workspace], None]], while_waiting: Callable[[], None]
    ) -> BaseException | None:
        """Do every job once. ``while_waiting`` is called a few times a second by the calling thread, and may raise.

        The first exception of a job ends the pass, when the jobs under way have ended, and is returned.
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

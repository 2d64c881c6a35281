"""Fetches the source of the bundle that this worker will probably get next, while its device works on another one."""

from __future__ import annotations

import contextlib
import logging
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil

from qbatch.core.errors import DatabaseUnreachable, one_line
from qbatch.core.settings import Settings
from qbatch.models_db.next_bundle import NextBundle, find_next_bundle, is_worth_fetching
from qbatch.models_db.session import Database
from qbatch.worker.runner import entry_points
from qbatch.worker.runner.messages import FetchOrder, FilesHashed, FilesKnown, FilesSeen
from qbatch.worker.serving.known_files import KnownFiles
from qbatch.worker.serving.runners import Runners
from qbatch.worker.sources.source_policy import SourcePolicy

log = logging.getLogger("qbatch.worker")


class NextSource:
    """One fetch at a time, in a process of its own. It claims nothing and charges nobody. ``close`` it at the end."""

    def __init__(
        self, *, database: Database, settings: Settings, runners: Runners, worker_id: int, queues: tuple[str, ...]
    ) -> None:
        self._database = database
        self._settings = settings
        self._runners = runners
        self._worker_id = worker_id
        self._queues = queues
        self._files = KnownFiles(database)
        self._fetch: tuple[NextBundle, BaseProcess, Connection] | None = None
        # The bundle that was fetched last, so that it is not fetched again and again.
        self._last_job_id: int | None = None

    @property
    def pid(self) -> int | None:
        """The process that fetches now."""
        return None if self._fetch is None else self._fetch[1].pid

    def begin(self) -> None:
        """Begin to fetch what comes next, unless a fetch is going on."""
        self.look()
        if self._fetch is not None:
            return
        try:
            with self._database.read() as session:
                self._database.require_own(session)
                found = find_next_bundle(
                    session, self._queues, worker_id=self._worker_id, lease_s=self._settings.lease_s
                )
        except DatabaseUnreachable as error:
            log.warning("%s; nothing is fetched ahead", error)
            return
        if found is not None and found.job_id != self._last_job_id:
            self._start(found)

    def serve(self) -> None:
        """Answer what the fetching process asks. Call it often; it does not wait."""
        if self._fetch is None:
            return
        _, _, connection = self._fetch
        try:
            while connection.poll():
                match connection.recv():
                    case FilesSeen() as seen:
                        connection.send(FilesKnown(digests=self._files.known(seen)))
                    case FilesHashed() as hashed:
                        self._files.remember(hashed)
        except (EOFError, OSError):
            # It has ended, or is about to. It is not waited for, since a runner may have stopped it just now.
            connection.close()
            self._fetch = None

    def look(self) -> None:
        """Stop the fetch if its bundle is gone or no longer waits for it."""
        if self._fetch is None:
            return
        self.serve()
        if self._fetch is None:
            return
        bundle = self._fetch[0]
        try:
            with self._database.read() as session:
                self._database.require_own(session)
                goes_on = is_worth_fetching(session, bundle.job_id, worker_id=self._worker_id)
        except DatabaseUnreachable as error:
            log.warning("%s; fetching ahead continues", error)
            return
        if not goes_on:
            log.info("%s is not fetched ahead any more: its bundle has begun or is gone", bundle.source.name)
            self.close()

    def resume(self) -> None:
        """Continue the process, which a runner may have stopped before the runner ended."""
        if self._fetch is not None and self.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self.pid).resume()

    def close(self) -> None:
        """End the fetch. What it has downloaded stays in the cache."""
        fetch, self._fetch = self._fetch, None
        if fetch is not None:
            _, process, connection = fetch
            if process.is_alive():
                process.kill()
            connection.close()
            process.join()

    def _start(self, found: NextBundle) -> None:
        order = FetchOrder(
            source=found.source,
            cache=self._settings.cache,
            cache_bytes=self._settings.cache_bytes,
            policy=SourcePolicy(
                roots=self._settings.allowed_roots,
                trusted=self._settings.trust_remote_code,
                allow_pickle=found.allow_pickle,
            ),
        )
        try:
            process, connection = self._runners.fork(entry_points.fetch_ahead, order)
        except (EOFError, OSError) as error:
            log.warning("nothing is fetched ahead: no process can be started (%s)", one_line(error))
            return
        self._fetch = (found, process, connection)
        self._last_job_id = found.job_id
        log.info("fetching %s ahead", found.source.name)

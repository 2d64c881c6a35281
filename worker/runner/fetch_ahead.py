"""A process that fetches the source of a bundle that nobody has claimed yet: into the cache, and its checksums."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection

from qbatch.core.digest import Checksums
from qbatch.core.errors import JobError, one_line
from qbatch.core.file_stat import FileStat
from qbatch.scheduler.child_process import end_with_parent
from qbatch.worker.machine.logs import log_to_stderr
from qbatch.worker.runner.messages import FetchOrder, FilesHashed, FilesKnown, FilesSeen
from qbatch.worker.sources.fetch import fetch_source

log = logging.getLogger("qbatch.worker")

# The worker answers only while it supervises a bundle. When it has none, this one has come or gone elsewhere.
_PATIENCE_S = 60.0
_NICENESS = 10


class _WorkersDigests:
    """The checksums that the worker has on record, asked for through a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def known(self, stats: Iterable[FileStat]) -> Mapping[FileStat, Checksums]:
        self._connection.send(FilesSeen(stats=tuple(stats)))
        if not self._connection.poll(_PATIENCE_S):
            raise EOFError
        reply = self._connection.recv()
        assert isinstance(reply, FilesKnown)  # noqa: S101  (each question has its reply)
        return reply.digests

    def remember(self, digests: Mapping[FileStat, Checksums]) -> None:
        if digests:
            self._connection.send(FilesHashed(digests=digests))


def _let_forkserver_end() -> None:
    """Close the pipe that keeps the forkserver alive. It ends when its worker has closed it, and all of its forks, each
    of which gets it to start processes too: one that is stopped would keep it for ever, and itself with it."""
    keeps_alive = vars(forkserver._forkserver)
    fd = keeps_alive.get("_forkserver_alive_fd")
    if fd is not None:
        os.close(fd)
        keeps_alive["_forkserver_alive_fd"] = None


def run(connection: Connection, order: FetchOrder) -> None:
    """Fetch and exit. A failure is only logged: the job itself will meet it again, and is charged then if at all."""
    gc.freeze()
    # With its worker's forkserver. Stopped, it would not notice that its pipe closes.
    end_with_parent()
    _let_forkserver_end()
    log_to_stderr()
    os.nice(_NICENESS)
    name = order.source.name
    try:
        with fetch_source(
            order.source,
            cache=order.cache,
            cache_bytes=order.cache_bytes,
            policy=order.policy,
            on_progress=lambda _done, _total: None,
            digests=_WorkersDigests(connection),
        ):
            log.info("%s: fetched ahead", name)
    except JobError as error:
        log.info("%s: not fetched ahead: %s", name, one_line(error))
    except (EOFError, OSError):
        log.info("%s: not fetched ahead: its worker no longer listens", name)
    connection.close()
    os._exit(0)

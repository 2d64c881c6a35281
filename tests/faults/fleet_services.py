"""The services that a fleet leans on, each of which can fail as the real one does."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from qbatch.scheduler.private_redis import redis_server_path
from tests.waiting import until

PASSWORD = "a-canary-password"  # noqa: S105
_BLOCK_BYTES = 2**16


class Redis:
    """A Redis of the test's own on loopback, behind a password, that keeps nothing unless told to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=PASSWORD, decode_responses=True)

    def start(self, *, aof: bool = False) -> None:
        """``aof``: with the append-only file that ``keep_everything`` wrote."""
        self._folder.mkdir(exist_ok=True)
        argv = [redis_server_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD]
        argv += ["--dir", str(self._folder), "--save", "", "--maxmemory-policy", "noeviction"]
        argv += ["--appendonly", "yes" if aof else "no", "--appendfsync", "always"]
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        until(self._answers, "Redis")

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def keep_everything(self) -> None:
        """Turn the append-only file on, and wait until it holds what there is."""
        with self.client() as client:
            client.config_set("appendonly", "yes")
            until(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0, "append-only file")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Wire:
    """A network between clients and a port of this machine, that can be cut as a firewall cuts it: without a word.

    Connections that were open at the cut stay silent for ever. While it is cut new ones are accepted, and silent too.
    """

    def __init__(self, port_behind: int) -> None:
        self._behind = ("127.0.0.1", port_behind)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        self._is_cut = False
        self._pairs: list[_Pair] = []
        self._acceptor = threading.Thread(target=self._accept, name="wire")
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread that sits in accept() is not woken by a close.
        self._door.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._door.close()
        for pair in self._pairs:
            pair.close()

    def cut(self) -> None:
        self._is_cut = True
        for pair in self._pairs:
            pair.is_silent = True

    def mend(self) -> None:
        self._is_cut = False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._door.accept()
                try:
                    server = socket.create_connection(self._behind)
                except OSError:
                    client.close()
                    continue
                self._pairs.append(_Pair(client, server, is_silent=self._is_cut))


class _Pair:
    """One connection through the wire: its two ends, and a thread for each direction."""

    def __init__(self, client: socket.socket, server: socket.socket, *, is_silent: bool) -> None:
        self.is_silent = is_silent
        self._ends = (client, server)
        self._threads = [
            threading.Thread(target=self._carry, args=ends, name="wire")
            for ends in ((client, server), (server, client))
        ]
        for thread in self._threads:
            thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BLOCK_BYTES):
                if not self.is_silent:
                    sink.sendall(data)
        if not self.is_silent:
            self._hang_up()

    def _hang_up(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._hang_up()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

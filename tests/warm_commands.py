"""Runs commands in forks of a process that has imported the command line, which is most of a short command's time.

Each is a process with its own environment, folder and streams, as a shell would start it; only its imports were made
before. What is about starting, or is found by what /proc says of a process, wants a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

_FDS = 3
_PACKAGES = ("qbatch.core", "qbatch.models_db", "qbatch.scheduler", "qbatch.views", "qbatch.commands")
# What commands import by themselves when they need it.
_LATER = ("alembic.command", "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql.psycopg")
_STARTING_OTHERS = frozenset({"run", "up", "worker", "scheduler", "flower", "verify"})
# What the interpreter itself reads when it starts.
_OF_THE_INTERPRETER = ("PYTHON", "LANG", "LC_", "MALLOC_", "LD_")


def suits(command: str, environ: Mapping[str, str]) -> bool:
    """Whether a fork does the same as a process of its own: not for what starts others, nor with another locale."""
    return command not in _STARTING_OTHERS and _of_interpreter(environ) == _of_interpreter(os.environ)


def _of_interpreter(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_OF_THE_INTERPRETER)}


def run(
    argv: Sequence[str], *, environ: Mapping[str, str], cwd: Path | None, stdin: str, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run``. ``argv``: the program, which is ``qbatch`` whatever it is called, and its arguments."""
    with contextlib.ExitStack() as stack:
        given, output, errors = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(_FDS))
        given.write(stdin)
        given.seek(0)
        order = {"argv": list(argv), "environ": dict(environ), "cwd": str(cwd or Path.cwd())}
        code = _server().run(order, [given.fileno(), output.fileno(), errors.fileno()], timeout_s)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(argv, code, output.read(), errors.read())


class _Server:
    """The process that forks, and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._replies = self._socket.makefile("r")

    def run(self, order: Mapping[str, Any], descriptors: list[int], timeout_s: float) -> int:
        text = json.dumps(order).encode() + b"\n"
        socket.send_fds(self._socket, [text[:1]], descriptors)
        self._socket.sendall(text[1:])
        pid = int(self._replies.readline())
        self._socket.settimeout(timeout_s)
        try:
            return int(self._replies.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self.close()
            raise subprocess.TimeoutExpired(order["argv"], timeout_s) from None
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        _server.cache_clear()
        self._replies.close()
        self._socket.close()
        self._process.wait()


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


def _serve(connection: socket.socket) -> None:
    """Fork for each order until the connection closes. Returns in a fork too, which has an order then."""
    while True:
        first, descriptors, _, _ = socket.recv_fds(connection, 1, _FDS)
        if not first:
            sys.exit(0)
        with connection.makefile("rb") as rest:
            order = json.loads(first + rest.readline())
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(order, descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environ"])
    os.chdir(order["cwd"])
    sys.argv = order["argv"]


def _import_all() -> None:
    for name in ("qbatch.cli", *_LATER):
        importlib.import_module(name)
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if "migrations" not in module.name and not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def _work() -> NoReturn:
    """Be ``qbatch``, and end as the interpreter would, but for taking all modules apart: that takes longer than most
    commands."""
    from qbatch.cli import main

    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.disable()
    _import_all()
    gc.freeze()
    gc.enable()
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)
    _work()

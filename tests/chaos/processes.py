"""Who is who among the processes of a home."""

from __future__ import annotations

from collections import defaultdict
from enum import StrEnum
from pathlib import Path

import psutil

from tests.acceptance.conftest import processes_of


class Role(StrEnum):
    """What a process of qbatch's is."""

    STACK = "stack"
    LAUNCHER = "launcher"
    WORKER = "worker"
    FORKSERVER = "forkserver"
    RUNNER = "runner"
    SCHEDULER = "scheduler"
    REDIS = "redis"
    OTHER = "other"


Family = dict[Role, list[psutil.Process]]


def family_of(home: Path) -> Family:
    """Every living process of ``home`` by its role, the oldest first."""
    found: Family = defaultdict(list)
    for process in sorted(processes_of(home), key=_age):
        try:
            found[_role(process)].append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all of them, first to all and then looking back."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """All that it started, and they in turn; none where it is gone."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def runner_of(worker_pid: int) -> psutil.Process | None:
    """The runner of a Celery worker: its forkserver's child. None where there is none now."""
    try:
        for forkserver in psutil.Process(worker_pid).children():
            if _is_forked(forkserver.cmdline()) and (runners := forkserver.children()):
                return runners[0]
    except psutil.NoSuchProcess:
        return None
    return None


def has_an_order(runner: psutil.Process) -> bool:
    """Whether it writes a log, as a runner does once it works, unlike what stands by or fetches the next source."""
    try:
        return Path(f"/proc/{runner.pid}/fd/1").readlink().name.endswith(".runner.log")
    except OSError:
        return False


def _role(process: psutil.Process) -> Role:
    words = process.cmdline()
    if _is_forked(words):
        parent = process.parent()
        return Role.FORKSERVER if parent is not None and _is_worker(parent.cmdline()) else Role.RUNNER
    if words and "redis-server" in words[0]:
        return Role.REDIS
    if _is_worker(words):
        return Role.WORKER
    if _ends_with(words, "qbatch.worker", "launch") or _ends_with(words, "qbatch", "worker"):
        return Role.LAUNCHER
    if _ends_with(words, "qbatch", "up"):
        return Role.STACK
    return Role.SCHEDULER if words[-1:] in (["qbatch.scheduler"], ["scheduler"]) else Role.OTHER


def _is_worker(words: list[str]) -> bool:
    return _ends_with(words, "qbatch.worker", "serve")


def _is_forked(words: list[str]) -> bool:
    return any("multiprocessing.forkserver" in word for word in words)


def _ends_with(words: list[str], *last: str) -> bool:
    """Whether ``words`` end so, options aside."""
    return tuple(word for word in words if not word.startswith("-"))[-len(last) :] == last


def _age(process: psutil.Process) -> float:
    try:
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return 0.0

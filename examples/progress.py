"""Runs several tasks in processes of their own, and reports their progress every few seconds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundTask:
    """A task in a process of its own. ``messages`` receives pairs of (whether it is done, a text): what it is doing,
    and in the end how it went."""

    process: BaseProcess
    messages: Connection

    @classmethod
    def start(cls, work: Callable[..., str], *args: Any) -> Self:
        """Start ``work(*args, report)``, which returns a line that says how it went. It is killed if this process
        ends."""
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, args, sender), daemon=True)
        process.start()
        sender.close()
        return cls(process=process, messages=receiver)


def _run(work: Callable[..., str], args: tuple[Any, ...], messages: Connection) -> None:
    messages.send((True, work(*args, lambda text: messages.send((False, text)))))


def progress(work: Mapping[str, BackgroundTask], every_s: float = EVERY_S) -> Iterator[str]:
    """Yield lines to print as soon as they are due, until all tasks (by name) are done: one every ``every_s`` seconds,
    and one when a task is done.

    Raises RuntimeError if a task's process ends without a result; the process has printed the reason to stderr.
    """
    started = time.monotonic()
    running = dict(work)
    status = dict.fromkeys(work, "starting")
    due = started + every_s
    while running:
        ready = wait([task.messages for task in running.values()], timeout=max(due - time.monotonic(), 0.0))
        for name in [name for name, task in running.items() if task.messages in ready]:
            is_done, status[name] = _receive(name, running[name])
            if is_done:
                del running[name]
                yield status[name]
        if running and time.monotonic() >= due:
            due = time.monotonic() + every_s
            yield f"{time.monotonic() - started:4.0f} s  " + "; ".join(f"{name}: {status[name]}" for name in running)


def _receive(name: str, task: BackgroundTask) -> tuple[bool, str]:
    try:
        is_done, text = task.messages.recv()
    except EOFError as error:
        task.process.join()
        raise RuntimeError(f"{name} was not made: its process ended with code {task.process.exitcode}") from error
    return is_done, text

"""How far several pieces of work are: a line every few seconds, also while none of them has anything to say."""

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
class Piece:
    """Work in a process of its own, which says (whether it is done, what it does or how it went)."""

    process: BaseProcess
    said: Connection

    @classmethod
    def start(cls, work: Callable[..., str], *args: Any) -> Self:
        """``work(*args, report)``: what it returns is the line that says how it went. It ends with this process."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, args, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(process=process, said=ours)


def _run(work: Callable[..., str], args: tuple[Any, ...], said: Connection) -> None:
    said.send((True, work(*args, lambda text: said.send((False, text)))))


def progress(work: Mapping[str, Piece], every_s: float = EVERY_S) -> Iterator[str]:
    """What to print, when it is to be printed, until each piece, here by its name, is done.

    Raises RuntimeError where one ends without a result; it has said why on stderr.
    """
    started = time.monotonic()
    pieces = dict(work)
    doing = dict.fromkeys(work, "starting")
    due = started + every_s
    while pieces:
        heard = wait([piece.said for piece in pieces.values()], timeout=max(due - time.monotonic(), 0.0))
        for name in [name for name, piece in pieces.items() if piece.said in heard]:
            is_done, doing[name] = _hear(name, pieces[name])
            if is_done:
                del pieces[name]
                yield doing[name]
        if pieces and time.monotonic() >= due:
            due = time.monotonic() + every_s
            yield f"{time.monotonic() - started:4.0f} s  " + "; ".join(f"{name}: {doing[name]}" for name in pieces)


def _hear(name: str, piece: Piece) -> tuple[bool, str]:
    try:
        is_done, text = piece.said.recv()
    except EOFError as error:
        piece.process.join()
        raise RuntimeError(f"{name} was not made: its process ended with code {piece.process.exitcode}") from error
    return is_done, text

"""Every command of the command line, run in the environment of this process: what a broken one makes of each.

As a program it prints, as JSON, each command's exit code, its lines on standard error, and an exception that it let
through: one process for all of them, as each takes most of a second to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

_TOO_LONG_S = 60
_ARGUMENTS: Mapping[str, Sequence[str]] = {
    "submit": ("org/model", "--bits", "4"),
    "plan": ("org/model", "--bits", "4"),
    "diff": ("b1", "b1"),
    "report": ("b1", "-o", "/proc/no/report.html"),
    "run": ("org/model", "--bits", "4", "--device", "cpu"),
    "wait": ("b1", "--timeout", "1s"),
    "worker": ("--cpu",),
    "up": ("--cpu",),
    "cancel": ("b1",),
    "retry": ("b1",),
    "show": ("b1",),
    "logs": ("j1",),
    "inspect": ("/no/such/model",),
    "prune": ("--older-than", "1d"),
    "keep": ("--recommended", "--yes"),
    "gc": ("--yes",),
    "rm": ("b1", "--yes"),
    "healthcheck": ("scheduler",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOutcome:
    """``lines`` are those on standard error; ``let_through`` is an exception that was not turned into one of them."""

    code: int
    lines: list[str]
    let_through: str | None


def words_of_all(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, without options."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from words_of_all(command, (*prefix, name))
        else:
            yield (*prefix, name)


def run_every_command(
    *places: Mapping[str, str],
    but: Sequence[str] = (),
    before: Sequence[str] = (),
    preexec: Callable[[], None] | None = None,
) -> list[dict[str, CommandOutcome]]:
    """What became of each command but those in ``but``, by its name, with the settings of each of ``places``.

    ``before``: the program that starts it.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("QBATCH_")}
    done = subprocess.run(
        [*before, sys.executable, "-m", "tests.every_command", json.dumps(places), *but],
        env=inherited | {"HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parent.parent,
        preexec_fn=preexec,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [{name: CommandOutcome(**outcome) for name, outcome in of_place.items()} for of_place in found]


def _is_late(_: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it waits, in {frame}")


def _invoke(words: Sequence[str], place: Mapping[str, str]) -> dict[str, Any]:
    from click.testing import CliRunner

    from qbatch.cli import main

    signal.signal(signal.SIGALRM, _is_late)
    signal.alarm(_TOO_LONG_S)
    done = CliRunner().invoke(main, [*words, *_ARGUMENTS.get(words[-1], ())], env=place)
    signal.alarm(0)
    is_exit = done.exception is None or isinstance(done.exception, SystemExit)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"code": done.exit_code, "lines": lines, "let_through": None if is_exit else repr(done.exception)}


def _main() -> None:
    from qbatch.cli import main

    places, but = json.loads(sys.argv[1]), sys.argv[2:]
    every = {" ".join(words): words for words in words_of_all(main)}
    chosen = {name: words for name, words in every.items() if name not in but}
    found = [{name: _invoke(words, place) for name, words in chosen.items()} for place in places]
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _main()

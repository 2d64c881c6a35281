"""The commands in the README and the docs are ones that qbatch parses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import parse_qbatch

ROOT = Path(__file__).parents[2]
# cli.md is generated from the commands themselves; how-tos show commands that a reader is to add.
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "cli.md"}
)
_TO_BE_ADDED = frozenset({"models"})


def commands() -> Iterator[str]:
    """Those in blocks of code, each on a line of its own, and those between backticks that have more than a word."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        in_blocks = re.findall(r"^(?: {4}|\$ |export .*; )?(qbatch [a-z].*)$", text, flags=re.MULTILINE)
        between = re.findall(r"`(qbatch [a-z][^`\n]*)`", text)
        for line in (*in_blocks, *between):
            yield from (part.strip() for part in re.split(r"&&|\|", line.split("  #")[0]) if part.strip())


def is_whole(command: str) -> bool:
    """Whether it could be typed as it stands: no placeholder, nothing left out, and no sentence that begins with it."""
    return command.startswith("qbatch ") and not re.search(
        r"…|[A-Z]{3,}|\.\.\.|\[|\$|<|^qbatch [a-z]+$|[,:.] |\.$", command
    )


WHOLE = sorted({command for command in commands() if is_whole(command)})


@pytest.mark.parametrize("command", WHOLE)
def test_qbatch_takes_the_command(command: str) -> None:
    _, *arguments = shlex.split(command)
    if arguments[0] not in _TO_BE_ADDED:
        parse_qbatch(arguments)


def test_there_are_commands() -> None:
    assert len(WHOLE) > 10

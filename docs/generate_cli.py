"""Write docs/cli.md from the commands themselves: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from qbatch.cli import main
from qbatch.core import errors

DOCS = Path(__file__).parent
# Characters. Set here, so that the terminal of whoever generates the page changes nothing.
WIDTH = 100

INTRODUCTION = """\
# Command reference

`make docs` writes this page from the commands' own help; a test fails when it is out of date. Change the help text in
`commands/`, never this page. The words are explained in the [glossary](glossary.md).
"""

EXIT_CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | The command did what was asked. After `run`, `wait`, `watch` and `submit --wait`: every job succeeded. |
| 1 | Something is wrong. After `run`, `wait`, `watch` and `submit --wait`: a job failed or was cancelled. |
"""
_OF_SIGNALS = (
    "| 130 | Ctrl-C stopped the command. |",
    "| 141 | Whoever read what the command printed has closed the pipe, as `head` does. |",
)


def reference() -> str:
    """The text of docs/cli.md."""
    whole = click.Context(main, info_name="qbatch", terminal_width=WIDTH, **main.context_settings)
    return "\n".join([INTRODUCTION, *map(_section, contexts(whole)), _exit_codes(), _environment()])


def contexts(context: click.Context) -> Iterator[click.Context]:
    """``context`` and those of the commands below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.commands[name]
            yield from contexts(click.Context(command, parent=context, info_name=name))


def _section(context: click.Context) -> str:
    return f"## `{context.command_path}`\n\n```text\n{context.get_help()}\n```\n"


def _exit_codes() -> str:
    named = [error for error in vars(errors).values() if _has_exit_code(error)]
    rows = [f"| {error.exit_code} | {_first_sentence(error)} |" for error in sorted(named, key=lambda e: e.exit_code)]
    return EXIT_CODES + "\n".join([*rows, *_OF_SIGNALS, ""])


def _has_exit_code(value: object) -> bool:
    """Whether it is an error with an exit code of its own, other than the base's 1."""
    return isinstance(value, type) and value is not errors.QbatchError and "exit_code" in vars(value)


def _first_sentence(documented: type) -> str:
    return " ".join((documented.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."


def _environment() -> str:
    """The README's table of variables: it is written once, there."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    settings = readme.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [line for line in settings.splitlines() if line.startswith("|")]
    return "\n".join(["## Environment variables", "", "Every command reads these, as do the workers.", "", *rows, ""])


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(reference(), encoding="utf-8")

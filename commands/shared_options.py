"""The options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from qbatch.commands.completion import complete_batch, complete_target
from qbatch.core.domain import LARGEST_ID

Command = TypeVar("Command", bound=Callable[..., Any])
_BATCH_OPTIONS = "qbatch.batch_options"
ON_A_TERMINAL = 50
"""How many rows of a long list a terminal shows by default."""


def format_options(*formats: str) -> Callable[[Command], Command]:
    """Add the options --format and --json, and -q where ``quiet`` is one of the formats."""

    def add(command: Command) -> Command:
        # The last declared one of several options for a parameter gives its default: --format is applied first.
        command = click.option(
            "--format", "format_", type=click.Choice(formats), default="table", show_default=True, help="Output format."
        )(command)
        command = click.option("--json", "format_", flag_value="json", default=None, help="The same as --format json.")(
            command
        )
        if "quiet" not in formats:
            return command
        return click.option(
            "-q", "format_", flag_value="quiet", default=None, help="Print ids alone: the same as --format quiet."
        )(command)

    return add


def batch_arguments(rows: str | None = None, *, required: bool = False) -> Callable[[Command], Command]:
    """Add the argument BATCH..., and for a command that shows ``rows`` the option --batch, which means the same."""

    def add(command: Command) -> Command:
        metavar = "BATCH..." if required else "[BATCH]..."
        argument = click.argument(
            "batches",
            nargs=-1,
            required=required,
            metavar=metavar,
            shell_complete=complete_batch,
            callback=_with_options,
        )
        if rows is None:
            return argument(command)
        option = click.option(
            "--batch",
            multiple=True,
            metavar="BATCH",
            shell_complete=complete_batch,
            # Before the argument, which takes over what was given here.
            is_eager=True,
            expose_value=False,
            callback=_keep_for_arguments,
            help=f"Show only {rows} of this batch, like the argument BATCH; may be repeated.",
        )
        return argument(option(command))

    return add


def _keep_for_arguments(context: click.Context, _: click.Parameter, words: tuple[str, ...]) -> None:
    context.meta[_BATCH_OPTIONS] = words


def _with_options(context: click.Context, _: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    return (*words, *context.meta.get(_BATCH_OPTIONS, ()))


def with_all(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """Add options to ``command``, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def target_arguments(command: Command) -> Command:
    """Add the argument BATCH|JOB..."""
    return click.argument("targets", nargs=-1, required=True, metavar="BATCH|JOB...", shell_complete=complete_target)(
        command
    )


def limit_option(rows: str) -> Callable[[Command], Command]:
    """Add the option --limit of a command that lists ``rows``."""
    return click.option(
        "--limit",
        type=click.IntRange(1, LARGEST_ID),
        metavar="INTEGER",
        help=f"Show at most this many {rows}.  [default: {ON_A_TERMINAL} in a table on a terminal, else all]",
    )


def page_limit(limit: int | None, format_: str) -> int | None:
    """How many rows to show: as many as were asked for, else a page on a terminal, and all for a program."""
    return ON_A_TERMINAL if limit is None and format_ == "table" and sys.stdout.isatty() else limit

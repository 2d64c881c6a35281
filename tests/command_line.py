"""Commands as a shell would start them, parsed by their own parser and not run."""

from __future__ import annotations

from collections.abc import Sequence

import click

from qbatch.cli import main


def parse_qbatch(arguments: Sequence[str]) -> None:
    """Raises click.UsageError if ``qbatch`` would not take them."""
    command: click.Command = main
    while isinstance(command, click.Group):
        word, *arguments = arguments
        command = command.commands[word]
    # A command keeps the help option of the first context that it is asked in.
    parent = click.Context(main, info_name="qbatch", **main.context_settings)
    command.make_context(command.name, list(arguments), parent=parent)

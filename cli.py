"""The entry of the command line: all commands, and how their errors are shown.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import click

from qbatch.commands.context import INTERRUPTED
from qbatch.commands.lazy_commands import LazyCommands
from qbatch.core.control_characters import is_unicode
from qbatch.core.errors import QbatchError, StorageUnavailable
from qbatch.core.plain_terminal import show_anything

if __name__ != "qbatch.cli":
    raise ImportError("import this module as qbatch.cli, not under another name")


SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Submit and watch": {
        "submit": "submission",
        "plan": "planning_ahead",
        "inspect": "examining",
        "run": "submission",
        "watch": "wait_and_watch",
        "wait": "wait_and_watch",
        "status": "queue_state",
        "jobs": "queue_state",
        "workers": "queue_state",
        "logs": "job_logs",
        "cancel": "job_changes",
        "retry": "job_changes",
    },
    "Results": {
        "results": "measurements",
        "compare": "measurements",
        "diff": "measurements",
        "show": "measurements",
        "report": "reporting",
    },
    "Checkpoints": {
        "verify": "examining",
        "card": "model_cards",
        "du": "storage_space",
        "gc": "storage_space",
        "keep": "storage_space",
        "rm": "storage_space",
    },
    "Run the service": {
        "up": "services",
        "worker": "services",
        "scheduler": "services",
        "flower": "services",
        "healthcheck": "services",
        "doctor": "examining",
        "prune": "maintenance",
        "db": "maintenance",
    },
}
"""The module of each command, in the sections and the order in which help lists them."""

# The exit code that shells give to a process that SIGPIPE ended.
_NOBODY_READS = 141


class _Group(click.Group):
    """Turns a domain error into one line and its exit code; never a traceback for what a user can cause."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        limit = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit)) for name in commands])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        show_anything(sys.stdout, sys.stderr)
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A file name may be any sequence of bytes, but only valid text can be stored and shown.
        for argument in args:
            if not is_unicode(argument):
                ctx.fail(f"{argument!r} is not UTF-8 text")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QbatchError as error:
            first, *others = error.lines
            click.echo("\n".join([f"qbatch: {first}", *others]), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(err=True)  # the terminal shows ^C where the cursor was
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _leave_closed(sys.stdout, sys.stderr)
            ctx.exit(_NOBODY_READS)
        except OSError as error:
            if error.filename is None:
                raise  # of no place that a user could mend
            from qbatch.core.filesystem import why_unusable

            click.echo(f"qbatch: {why_unusable(error)}", err=True)
            ctx.exit(StorageUnavailable.exit_code)


def _leave_closed(*streams: TextIO) -> None:
    """Whoever read these has closed them, as ``head`` does. Without this, Python would complain when it ends."""
    for stream in streams:
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.group(
    cls=_Group,
    commands=LazyCommands({name: module for section in SECTIONS.values() for name, module in section.items()}),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="qbatch")
def main() -> None:
    """Quantize models in batches, benchmark them, and see which to ship."""
    from qbatch.scheduler.child_process import hide_from_equals

    hide_from_equals()


if __name__ == "__main__":
    main()

"""The options of the commands that show results: which rows, how they are laid out, and limits on what is shipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from qbatch.commands.completion import complete_column, complete_columns, complete_model
from qbatch.commands.parameter_types import Amount, Bits, ByteSize, ColumnNames, Schemes, Since, joined
from qbatch.commands.shared_options import batch_arguments, with_all
from qbatch.core.domain import LARGEST_ID, JobState
from qbatch.views.comparison import ORIENTATIONS, PREFERENCES

if TYPE_CHECKING:
    from qbatch.models_db.result_filter import ResultFilter

Command = TypeVar("Command", bound=Callable[..., Any])


def compare_options(command: Command) -> Command:
    """Add the options of ``compare``: which rows to compare, their layout, and limits on the recommended one."""
    options = [
        batch_arguments("results"),
        models_option(" Of one model all figures are shown and what limits its speed, of several the main ones."),
        click.option(
            "--by",
            type=click.Choice(ORIENTATIONS),
            default="figure",
            show_default=True,
            help="What each line of the table shows: one figure, with a column for each scheme, or one scheme.",
        ),
        preference_options,
        click.option("--legend", "has_legend", is_flag=True, help="Explain the marks."),
    ]
    return with_all(options, command)


def models_option(more: str = "") -> Callable[[Command], Command]:
    """Add the option --model; ``more`` is what its help says besides."""
    return click.option(
        "--model",
        "models",
        multiple=True,
        shell_complete=complete_model,
        metavar="TEXT|GLOB",
        help="Only models whose name contains this text, or is like this pattern ('meta-llama/*-8B*'); may be repeated."
        + more,
    )


def preference_options(command: Command) -> Command:
    """Add the options that decide which configuration is recommended: what to prefer, and limits."""
    options = [
        click.option(
            "--prefer",
            type=click.Choice(PREFERENCES),
            default="size",
            show_default=True,
            help="What to optimize among the schemes that meet the limits: small weights, speed, or quality.",
        ),
        click.option(
            "--max-kl", type=Amount(min=0), help="The largest acceptable mean KL divergence from the baseline, in nats."
        ),
        click.option(
            "--max-ppl-ratio",
            type=Amount(min=0),
            help="The largest acceptable perplexity, divided by the baseline's: 1.01.",
        ),
        click.option(
            "--max-weights-bytes", type=ByteSize(), help="The most memory that the weights may take: 6GB, 5.5GiB."
        ),
        click.option(
            "--min-tokens-per-s", type=Amount(min=0), help="The lowest acceptable rate of decoding, as measured."
        ),
    ]
    return with_all(options, command)


def filter_options(command: Command) -> Command:
    """Add the options that choose rows of results: what they are of, and limits on their figures."""
    options = [
        models_option(),
        click.option(
            "--scheme",
            "schemes",
            type=Schemes(),
            multiple=True,
            metavar="NAME",
            help="Only these methods, separated by commas; may be repeated. none is the baseline, auto a search.",
        ),
        click.option(
            "--bits",
            type=Bits(),
            multiple=True,
            help="Only these bit widths, separated by commas; may be repeated: 4,8.",
        ),
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="TEXT|GLOB",
            help="Only what was measured on a device whose name contains this text, or is like this pattern; may be "
            "repeated.",
        ),
        click.option(
            "--state",
            "states",
            type=click.Choice([state.value for state in JobState]),
            multiple=True,
            help="Only jobs in this state; may be repeated.",
        ),
        click.option(
            "--since",
            type=Since(),
            metavar="DURATION|DATE",
            help="Only jobs that ended since then, or that were submitted since then and have not ended: 2h, 7d, "
            "2026-11-28.",
        ),
        click.option("--max-weights-bytes", type=ByteSize(), help="Only weights of at most this size: 6GB, 5.5GiB."),
        click.option(
            "--max-kl", type=Amount(min=0), help="Only rows of at most this mean KL divergence from the baseline."
        ),
        click.option(
            "--min-tokens-per-s", type=Amount(min=0), help="Only rows that decode at this rate or a higher one."
        ),
    ]
    return with_all(options, command)


def layout_options(command: Command) -> Command:
    """Add the options for the order, the number and the columns of the rows that are shown."""
    options = [
        click.option(
            "--sort",
            metavar="COLUMN",
            shell_complete=complete_column,
            help="One table, ranked by a column, by its title or as in JSON: kl, decode. -COLUMN sorts descending.",
        ),
        click.option(
            "--limit", type=click.IntRange(1, LARGEST_ID), metavar="INTEGER", help="Show at most this many rows."
        ),
        click.option(
            "--columns",
            type=ColumnNames(),
            multiple=True,
            shell_complete=complete_columns,
            metavar="COLUMN,...",
            help="Show these columns, by their titles or as in JSON: weights,kl,peak-memory; may be repeated.",
        ),
        click.option("--wide", "is_wide", is_flag=True, help="Show all columns, however narrow the terminal is."),
        click.option("--legend", "has_legend", is_flag=True, help="Explain the columns, the marks, and the speeds."),
    ]
    return with_all(options, command)


def read_filter(options: dict[str, Any]) -> ResultFilter:
    """What ``filter_options`` chose."""
    from qbatch.models_db.result_filter import ResultFilter

    return ResultFilter(
        models=options["models"],
        schemes=tuple(map(str, joined(options["schemes"]))),
        bits=joined(options["bits"]),
        devices=options["devices"],
        states=options["states"],
        since_s=options["since"],
        max_weights_bytes=options["max_weights_bytes"],
        max_kl=options["max_kl"],
        min_tokens_per_s=options["min_tokens_per_s"],
    )

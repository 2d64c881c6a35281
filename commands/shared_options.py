"""The options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from qbatch.commands.completion import complete_batch, complete_path, complete_target
from qbatch.commands.parameter_types import (
    Amount,
    Bits,
    ByteSize,
    Counts,
    Name,
    Parts,
    Patterns,
    Recoveries,
    Schemes,
    TimeLimit,
)
from qbatch.core.domain import LARGEST_ID
from qbatch.core.kinds import DeviceKind, DType
from qbatch.core.methods.description import MethodOption
from qbatch.core.methods.registry import Method, every_option, known_bits, quant_types, selected_by_bits
from qbatch.core.recovery import DEFAULT_RANK
from qbatch.core.search.bound import AUTO

Command = TypeVar("Command", bound=Callable[..., Any])
# The largest that a column of either database holds.
_LARGEST = LARGEST_ID
_BATCH_OPTIONS = "qbatch.batch_options"
OF_A_SHAPE, EACH = "shape", "each"
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
        type=click.IntRange(1, _LARGEST),
        metavar="INTEGER",
        help=f"Show at most this many {rows}.  [default: {ON_A_TERMINAL} in a table on a terminal, else all]",
    )


def page_limit(limit: int | None, format_: str) -> int | None:
    """How many rows to show: as many as were asked for, else a page on a terminal, and all for a program."""
    return ON_A_TERMINAL if limit is None and format_ == "table" and sys.stdout.isatty() else limit


def _usual(bits: int) -> str:
    return f"{bits} means {selected_by_bits(bits)[0]}"


def _method_option(option: MethodOption[Any]) -> Callable[[Command], Command]:
    """The flag of a method's own option."""
    if isinstance(option.default, bool):
        negated = option.flag.replace("--", "--no-", 1)
        return click.option(
            f"{option.flag}/{negated}", option.name, default=option.default, show_default=True, help=option.help
        )
    kind = click.Choice(option.choices) if option.choices else Amount(min=0)
    return click.option(
        option.flag, option.name, type=kind, default=option.default, show_default=True, help=option.help
    )


def submit_options(command: Command) -> Command:
    """Add the options that ``submit`` and ``run`` share."""
    return request_options(format_options("table", "json", "quiet")(command))


def request_options(command: Command) -> Command:
    """Add the options that say what a batch does: those of ``submit``, but for how it prints."""
    options = [
        click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_path),
        click.option(
            "--models",
            "models_file",
            metavar="FILE",
            shell_complete=complete_path,
            help="A file with one MODEL per line: a hub id, perhaps with @revision, or a folder. - is standard input.",
        ),
        click.option(
            "--bits",
            type=Bits(),
            multiple=True,
            help="A comma list of 4, 8 and 16 (16: the baseline alone); may be repeated. "
            f"{' and '.join(_usual(bits) for bits in known_bits())}.",
        ),
        click.option(
            "--scheme",
            "schemes",
            type=Schemes(),
            multiple=True,
            metavar="NAME",
            help="Methods by name, instead of --bits or beside them; repeat it or give a comma list: "
            f"{', '.join(Method)}. {AUTO} looks for the layers of a 4-bit checkpoint that must stay at 16 bits for one "
            "of the next three options to hold (docs/search.md).",
        ),
        click.option(
            "--max-kl",
            type=Amount(min=0),
            help=f"With --scheme {AUTO}: the largest mean KL divergence from the baseline, with two errors: 0.005.",
        ),
        click.option(
            "--max-ppl-ratio",
            type=Amount(min=0),
            help=f"With --scheme {AUTO}: the largest perplexity, divided by the baseline's, with two errors: 1.01.",
        ),
        click.option(
            "--max-weights-bytes",
            type=ByteSize(),
            help=f"With --scheme {AUTO}: the most memory that the weights may take, for the lowest KL: 6GB, 5.5GiB.",
        ),
        click.option(
            "--quant-type",
            "quant_types",
            multiple=True,
            metavar="|".join(quant_types()),
            help=f"4-bit data types; repeat it or give a comma list.  [default: {next(iter(quant_types()))}]",
        ),
        *map(_method_option, every_option()),
        click.option(
            "--recover",
            type=Recoveries(),
            metavar="KIND",
            help="For each 4-bit scheme, also make and measure an adapter that wins back a part of what quantizing "
            "took (needs qbatch[recover]), as a comma list. svd: factors of each weight's error. svd-act: the same, "
            "weighted by what the layers read on a text that comes with qbatch. qlora: factors trained to give the "
            "outputs of the unquantized model on --recover-text, in --recover-steps steps.",
        ),
        click.option(
            "--recover-rank",
            type=Counts(1),
            help="The rank of the adapters; several, separated by commas, are made one by one.  "
            f"[default: {DEFAULT_RANK}]",
        ),
        click.option(
            "--recover-text",
            metavar="FILE",
            help="The text that adapters are trained on (--recover qlora). It must share no 13 tokens in a row with an "
            "evaluation text.",
        ),
        click.option(
            "--recover-steps",
            type=click.IntRange(1, _LARGEST),
            metavar="INTEGER",
            help="How many steps adapters are trained for, each on four windows of 256 tokens.",
        ),
        click.option(
            "--compute-dtype",
            type=click.Choice([d.value for d in DType]),
            default="auto",
            show_default=True,
            help="The dtype in which quantized layers compute; auto: the dtype chosen by --dtype.",
        ),
        click.option(
            "--dtype",
            type=click.Choice([d.value for d in DType]),
            default="auto",
            show_default=True,
            help="The dtype of unquantized weights; auto: that of a 16-bit source, bfloat16 for an fp32 source.",
        ),
        click.option(
            "--device",
            type=click.Choice([d.value for d in DeviceKind]),
            default="auto",
            show_default=True,
            help="Where the jobs may run.",
        ),
        click.option(
            "--baseline/--no-baseline", default=True, show_default=True, help="Measure the unquantized model too."
        ),
        click.option(
            "--skip-modules",
            type=Patterns(),
            multiple=True,
            metavar="NAME",
            help="Layers to leave unquantized, besides those that transformers leaves: the end of their names "
            "(down_proj), their beginning up to a dot (model.layers.0), or a pattern (.*self_attn). Separate several "
            "with commas; may be repeated. The checkpoint lists the layers by their full names, which serving engines "
            "need (docs/howto/serve.md).",
        ),
        click.option(
            "--max-shard-size", type=ByteSize(), help="Split the weights into files of at most this size: 5GB."
        ),
        click.option(
            "--allow-pickle",
            is_flag=True,
            help="Convert the .bin weights of models without safetensors; by default such models are refused.",
        ),
        click.option("--name", type=Name(), help="A name for the batch."),
        click.option(
            "--priority",
            type=click.IntRange(-_LARGEST, _LARGEST),
            default=0,
            metavar="INTEGER",
            show_default=True,
            help="Batches with a higher priority run first.",
        ),
        click.option(
            "--time-limit",
            type=TimeLimit(),
            help="Stop a job after this much working time of its own: 90s, 15m, 2h, none.  "
            "[default: QBATCH_TIME_LIMIT_S, one day]",
        ),
        click.option(
            "--eval-text",
            "eval_texts",
            multiple=True,
            metavar="NAME|FILE",
            shell_complete=complete_path,
            help="The text to measure quality on: prose (the default), code, dialogue, or a text file; may be "
            "repeated. Speed is measured on the first.",
        ),
        click.option(
            "--tasks",
            multiple=True,
            metavar="NAME|FILE",
            shell_complete=complete_path,
            help="lm-evaluation-harness tasks (needs qbatch[eval]): task names or your own YAML files, separated by "
            "commas; may be repeated.",
        ),
        click.option(
            "--num-fewshot",
            type=click.IntRange(0, _LARGEST),
            help="The number of worked examples before each question of the tasks.",
        ),
        click.option(
            "--task-limit", type=click.IntRange(1, _LARGEST), help="Ask at most this many questions of each task."
        ),
        click.option(
            "--batch-size",
            "batch_sizes",
            type=Counts(1),
            multiple=True,
            help="How many sequences to generate at once; several, separated by commas, are measured one by one. May "
            "be repeated.  "
            "[default: 1]",
        ),
        click.option(
            "--prompt-tokens",
            type=Counts(1),
            multiple=True,
            help="The length of the prompts and of an encoder's input; several may be given, separated by commas, and "
            "the option may be repeated.  "
            "[default: 256, on a CPU 64]",
        ),
        click.option(
            "--new-tokens",
            type=Counts(2),
            multiple=True,
            help="How many tokens to generate; several may be given, separated by commas, and the option may be "
            "repeated.  [default: 64, on a CPU 16]",
        ),
        click.option(
            "--measure",
            type=Parts(),
            multiple=True,
            metavar="PART",
            help="What to measure, as a comma list; may be repeated. size: counted without loading the model, so that "
            "every model that can be quantized succeeds. quality: perplexity, the comparison with the baseline, and "
            "the tasks. speed: times and peaks of memory. why: on a GPU, what limits the decoding speed of a language "
            "model, which takes a few seconds per row and includes speed. energy: on a GPU, what a language model "
            "takes per token, which takes 40 s per row or more.  [default: size,quality,speed,why]",
        ),
        click.option(
            "--why/--no-why", default=None, help="Add why to what is measured, or leave it out.  [default: why]"
        ),
        click.option(
            "--energy/--no-energy",
            default=None,
            help="Add energy to what is measured, or leave it out.  [default: no-energy]",
        ),
        click.option(
            "--speed",
            type=click.Choice([EACH, OF_A_SHAPE]),
            default=EACH,
            show_default=True,
            help=f"{EACH}: time every model. {OF_A_SHAPE}: of a batch's models of the same shape, such as fine-tunes, "
            "time one on each GPU; the rows of the others say whose speed they have.",
        ),
        click.option(
            "--keep-going",
            is_flag=True,
            help="Leave out the models of which it is known here that their jobs would fail, and submit the others. By "
            "default nothing is submitted then.",
        ),
        click.option("--force", is_flag=True, help="Measure again even if the database already has the results."),
    ]
    return with_all(options, command)

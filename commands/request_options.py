"""The options of ``submit``, ``run`` and ``plan``: what a batch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from qbatch.commands.completion import complete_path
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
from qbatch.commands.shared_options import Command, format_options, with_all
from qbatch.core.domain import LARGEST_ID
from qbatch.core.kinds import DeviceKind, DType
from qbatch.core.methods.description import MethodOption
from qbatch.core.methods.registry import Method, every_option, known_bits, quant_types, selected_by_bits
from qbatch.core.recovery import DEFAULT_RANK
from qbatch.core.search.bound import AUTO

Option = Callable[[Any], Any]
OF_A_SHAPE, EACH = "shape", "each"


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


_MODELS: tuple[Option, ...] = (
    click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_path),
    click.option(
        "--models",
        "models_file",
        metavar="FILE",
        shell_complete=complete_path,
        help="A file with one MODEL per line: a hub id, perhaps with @revision, or a folder. - is standard input.",
    ),
)
"""Which models."""
_METHODS: tuple[Option, ...] = (
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
)
"""How they are quantized."""
_RECOVERY: tuple[Option, ...] = (
    click.option(
        "--recover",
        type=Recoveries(),
        multiple=True,
        metavar="KIND",
        help="For each 4-bit scheme, also make and measure an adapter that wins back a part of what quantizing "
        "took (needs qbatch[recover]); a comma list, may be repeated. svd: factors of each weight's error. "
        "svd-act: the same, weighted by what the layers read on a text that comes with qbatch. qlora: factors "
        "trained to give the outputs of the unquantized model on --recover-text, in --recover-steps steps.",
    ),
    click.option(
        "--recover-rank",
        type=Counts(1),
        multiple=True,
        help="The rank of the adapters; several, separated by commas, are made one by one. May be repeated.  "
        f"[default: {DEFAULT_RANK}]",
    ),
    click.option(
        "--recover-text",
        metavar="FILE",
        help="The text that adapters are trained on (--recover qlora). It must not share 13 tokens in a row with an "
        "evaluation text.",
    ),
    click.option(
        "--recover-steps",
        type=click.IntRange(1, LARGEST_ID),
        metavar="INTEGER",
        help="How many steps adapters are trained for, each on four windows of 256 tokens.",
    ),
)
"""The adapters that are made for the checkpoints."""
_DTYPES: tuple[Option, ...] = (
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
)
"""In which dtypes, and on which device."""
_FILES: tuple[Option, ...] = (
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
    click.option("--max-shard-size", type=ByteSize(), help="Split the weights into files of at most this size: 5GB."),
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Convert the .bin weights of models without safetensors; by default such models are refused.",
    ),
)
"""What the checkpoints leave unquantized, and what their files are like."""
_BATCH: tuple[Option, ...] = (
    click.option("--name", type=Name(), help="A name for the batch."),
    click.option(
        "--priority",
        type=click.IntRange(-LARGEST_ID, LARGEST_ID),
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
)
"""The batch itself."""
_QUALITY: tuple[Option, ...] = (
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
        type=click.IntRange(0, LARGEST_ID),
        help="The number of worked examples before each question of the tasks.",
    ),
    click.option(
        "--task-limit", type=click.IntRange(1, LARGEST_ID), help="Ask at most this many questions of each task."
    ),
)
"""On what quality is measured."""
_SHAPES: tuple[Option, ...] = (
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
)
"""At which shapes speed is measured."""
_PARTS: tuple[Option, ...] = (
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
    click.option("--why/--no-why", default=None, help="Add why to what is measured, or leave it out.  [default: why]"),
    click.option(
        "--energy/--no-energy",
        default=None,
        help="Add energy to what is measured, or leave it out.  [default: no-energy]",
    ),
    click.option(
        "--speed",
        type=click.Choice([EACH, OF_A_SHAPE]),
        default=None,
        help=f"{OF_A_SHAPE}: if models of a batch have the same shape, as fine-tunes do, time one of them on each GPU; "
        f"the rows of the others say whose speed they have. {EACH}: time every model.  [default: {OF_A_SHAPE}, on a "
        f"CPU {EACH}]",
    ),
)
"""Which parts are measured."""
_REPEATING: tuple[Option, ...] = (
    click.option(
        "--keep-going",
        is_flag=True,
        help="Leave out models whose jobs would certainly fail, as far as this machine can tell, and submit the "
        "others. By default nothing is submitted then.",
    ),
    click.option("--force", is_flag=True, help="Measure again even if the database already has the results."),
)
"""What is submitted of what was asked for."""
_ALL = (*_MODELS, *_METHODS, *_RECOVERY, *_DTYPES, *_FILES, *_BATCH, *_QUALITY, *_SHAPES, *_PARTS, *_REPEATING)


def submit_options(command: Command) -> Command:
    """Add the options that ``submit`` and ``run`` share."""
    return request_options(format_options("table", "json", "quiet")(command))


def request_options(command: Command) -> Command:
    """Add the options that say what a batch does: those of ``submit``, but for how it prints."""
    return with_all(_ALL, command)

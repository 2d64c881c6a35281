"""The types of command-line options, and the options that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from qbatch.core.byte_units import GIB, KIB, MIB
from qbatch.core.domain import LARGEST_ID
from qbatch.core.errors import UsageError
from qbatch.core.kinds import DeviceKind, DType
from qbatch.core.methods.description import MethodOption
from qbatch.core.methods.registry import Method, every_option, find_method, known_bits, meant_by_bits, quant_types
from qbatch.views.comparison import ORIENTATIONS, PREFERENCES

if __name__ != "qbatch.cli_options":
    raise ImportError("import this module as qbatch.cli_options, not under another name")

Command = TypeVar("Command", bound=Callable[..., Any])


# The largest that a column of either database holds.
_LARGEST = LARGEST_ID
ON_A_TERMINAL = 50
"""How many rows of a long list a terminal shows unless it is told."""


class Duration(click.ParamType[float]):
    """A duration such as 90, 90s, 15m, 2h or 1d, as a number of seconds. At most ten years."""

    name = "duration"
    _MOST = 3650 * 86400.0
    _UNITS: Mapping[str, float] = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        seconds = float(match[1]) * self._UNITS[match[2]] if match is not None else 0.0
        if not 0 < seconds <= self._MOST:
            self.fail(
                f"{_shorten(value)} is not a valid duration (use 90s, 15m, 2h or 1d; at most ten years)", param, ctx
            )
        return seconds


class TimeLimit(Duration):
    """A duration in seconds, or ``none``, which is infinity."""

    name = "time limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return math.inf if value == "none" else super().convert(value, param, ctx)


class Name(click.ParamType[str]):
    """A name that fits its database column."""

    name = "name"
    _LONGEST = 200

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if len(text) > self._LONGEST:
            self.fail(f"a name may have at most {self._LONGEST} characters; this one has {len(text)}", param, ctx)
        return text


class Bits(click.ParamType[tuple[int, ...]]):
    """A comma-separated list of bit widths."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(re.fullmatch(r"[0-9]{1,3}", part) for part in parts):
            self.fail(f"{_shorten(value)} is not a list of bit widths (use 4,8)", param, ctx)
        return tuple(map(int, parts))


class Schemes(click.ParamType[tuple[Method, ...]]):
    """A comma list of methods by name or alias."""

    name = "schemes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Method, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(find_method(part.strip()) for part in str(value).split(","))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Amount(click.FloatRange):
    """A finite number within a range. NaN is refused here because it passes every comparison with a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{_shorten(value)} is not a finite number", param, ctx)
        return number


class Patterns(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of names or regular expressions. A comma within brackets belongs to the expression."""

    name = "patterns"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        patterns = tuple(part.strip() for part in _split_outside_brackets(str(value)) if part.strip())
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                self.fail(f"{pattern!r} is not a valid regular expression: {error}", param, ctx)
        return patterns


def _split_outside_brackets(text: str) -> list[str]:
    parts: list[str] = []
    for piece in text.split(","):
        if parts and not _is_balanced(parts[-1]):
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts


def _is_balanced(pattern: str) -> bool:
    plain = re.sub(r"\\.", "", pattern)
    return all(plain.count(opening) == plain.count(closing) for opening, closing in ("()", "[]", "{}"))


class Counts(click.ParamType[tuple[int, ...]]):
    """A comma-separated list of whole numbers, each at least ``least``."""

    name = "counts"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        # int() alone would also accept 1_000 and the digits of other scripts.
        if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= self._least for part in parts):
            self.fail(f"{value!r} is not a comma-separated list of whole numbers of at least {self._least}", param, ctx)
        return tuple(int(part) for part in parts)


class ByteSize(click.ParamType[int]):
    """500MB, 5GB (powers of ten, as transformers reads them), 2GiB: bytes."""

    name = "size"
    _MOST = 2**63 - 1
    _UNITS: Mapping[str, int] = {
        "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": KIB, "MIB": MIB, "GIB": GIB
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", str(value).strip().upper())
        size = float(match[1]) * self._UNITS[match[2] or ""] if match is not None else 0.0
        if not 1 <= size <= self._MOST:
            self.fail(f"{_shorten(value)} is not a valid size (use 500MB, 5GB or 2GiB)", param, ctx)
        return int(size)


def _shorten(value: Any) -> str:
    """The repr of what was typed, shortened so that the error message fits on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def format_options(*formats: str) -> Callable[[Command], Command]:
    """Add the options --format and --json."""

    def add(command: Command) -> Command:
        command = click.option(
            "--format", "format_", type=click.Choice(formats), default="table", show_default=True, help="Output format."
        )(command)
        return click.option("--json", "format_", flag_value="json", default=None, help="The same as --format json.")(
            command
        )

    return add


def limit_option(rows: str) -> Callable[[Command], Command]:
    """Add the option --limit of a command that lists ``rows``."""
    return click.option(
        "--limit",
        type=click.IntRange(1, _LARGEST),
        metavar="INTEGER",
        help=f"Show at most this many {rows}.  [default: {ON_A_TERMINAL} in a table on a terminal, else all]",
    )


def compare_options(command: Command) -> Command:
    """Add the options of ``compare``: which rows to compare, their layout, and limits on the recommended one."""
    options = [
        click.option(
            "--batch", "batches", multiple=True, metavar="BATCH", help="Only results of this batch; may be repeated."
        ),
        click.option("--model", help="Only models whose name contains this text."),
        click.option(
            "--by",
            type=click.Choice(ORIENTATIONS),
            default="figure",
            show_default=True,
            help="What each line of the table shows: one figure, with a column for each scheme, or one scheme.",
        ),
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
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _usual(bits: int) -> str:
    return f"{bits} means {meant_by_bits(bits)[0]}"


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
    options = [
        click.option(
            "--models",
            "models_file",
            required=True,
            metavar="FILE",
            help="A file with one model per line: a hub id, perhaps with @revision, or a folder. - is standard input.",
        ),
        click.option(
            "--bits",
            type=Bits(),
            help="A comma list of 4, 8 and 16 (16: the baseline alone). "
            f"{' and '.join(_usual(bits) for bits in known_bits())}.",
        ),
        click.option(
            "--scheme",
            "schemes",
            type=Schemes(),
            multiple=True,
            metavar="NAME",
            help="Methods by name, instead of --bits or beside them; repeat it or give a comma list: "
            f"{', '.join(Method)}.",
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
            "with commas; may be repeated.",
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
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="A text file to measure perplexity on.",
        ),
        click.option(
            "--tasks",
            multiple=True,
            metavar="NAME|FILE",
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
            help="How many sequences to generate at once; several, separated by commas, are measured one by one.  "
            "[default: 1]",
        ),
        click.option(
            "--prompt-tokens",
            type=Counts(1),
            help="The length of the prompts and of an encoder's input; several may be given, separated by commas.  "
            "[default: 256, on a CPU 64]",
        ),
        click.option(
            "--new-tokens",
            type=Counts(2),
            help="How many tokens to generate; several may be given, separated by commas.  [default: 64, on a CPU 16]",
        ),
        click.option(
            "--why/--no-why",
            default=None,
            help="On a GPU, find out what limits the decoding speed of a language model; takes a few seconds per row.  "
            "[default: why]",
        ),
        click.option(
            "--energy/--no-energy",
            default=None,
            help="On a GPU, measure the energy that a language model takes per token; takes 40 s per row or more.  "
            "[default: no-energy]",
        ),
        click.option("--force", is_flag=True, help="Measure again even if the database already has the results."),
        click.option("-q", "format_", flag_value="quiet", default=None, help="The same as --format quiet."),
        format_options("table", "json", "quiet"),
    ]
    for option in reversed(options):
        command = option(command)
    return command

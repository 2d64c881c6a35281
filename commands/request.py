"""Reads what ``submit`` and ``run`` were given: files, options and limits."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.parameter_types import joined
from qbatch.commands.progress_bar import progress_bar
from qbatch.commands.request_options import OF_A_SHAPE
from qbatch.core.control_characters import escape_controls, is_unicode
from qbatch.core.domain import DeviceKind, DType, SourceRef
from qbatch.core.errors import UsageError
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.methods.registry import Method
from qbatch.core.recovery import DEFAULT_RANK, Recovery, RecoveryKind
from qbatch.core.search.bound import AUTO, Bound
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.scheduler.job_grid import Grid
    from qbatch.scheduler.screening import Screened
    from qbatch.scheduler.submit import Submission

# In characters. Enough for a list of a hundred thousand models, and for an evaluation text that takes a day to measure.
_MODEL_LIST_LIMIT = 16 * 2**20
_EVAL_TEXT_LIMIT = 64 * 2**20
_WITHOUT_A_LIST = "A single model is named without that option: qbatch submit"


def read_submission(settings: Settings, options: Mapping[str, Any], *, quiet: bool = True) -> Submission:
    """The request that the options of ``submit`` describe, with the models that can be used.

    The problems of those that cannot are printed to standard error with ``--keep-going``, and raised as ModelsRefused
    without it. Raises UsageError for any other mistake.
    """
    screened = read_request(settings, options, quiet=quiet)
    submission = screened.accepted(keep_going=options["keep_going"])
    for problem in screened.problems:
        click.echo(escape_controls(f"left out: {problem}"), err=True)
    return submission


def read_request(settings: Settings, options: Mapping[str, Any], *, quiet: bool = True) -> Screened:
    """The request that the options describe, and which models cannot be used. Raises UsageError for other mistakes."""
    from qbatch.scheduler.model_list import read_models
    from qbatch.scheduler.screening import screen

    asked = _asked(settings, options)
    listed = read_models(
        _read_list(options["models_file"]),
        named=options["models"],
        check_folders=settings.is_one_machine,
        roots=settings.allowed_roots,
        take_folder=_ask_for_folder if _is_terminal(options["models_file"]) and not quiet else None,
    )
    folders = sum(source.is_folder for source in listed.sources)
    with progress_bar("checking", folders, quiet=quiet) as on_progress:
        screened = screen(listed, asked, is_one_machine=settings.is_one_machine, on_progress=on_progress)
    for doubt in screened.doubts:
        click.echo(escape_controls(f"as this machine sees it: {doubt}"), err=True)
    return screened


def _asked(settings: Settings, options: Mapping[str, Any]) -> Callable[[tuple[SourceRef, ...]], Submission]:
    """Makes the request for some models. Raises UsageError."""
    from qbatch.scheduler.lm_eval_files import read_tasks
    from qbatch.scheduler.screening import refuse_unknown_tasks
    from qbatch.scheduler.submit import Submission

    recovery_texts, recoveries = _recoveries(options)
    measure: Set[MeasuredPart] | None = frozenset(joined(options["measure"])) or None
    bound = _bound(options, is_asked=AUTO in joined(options["schemes"]))
    grid = _grid(options, measure, recoveries, bound)
    if options["eval_texts"] and measure == {MeasuredPart.SIZE}:
        raise UsageError("--eval-text is about quality, speed and energy, which --measure leaves out")
    tasks = read_tasks([item.strip() for value in options["tasks"] for item in value.split(",") if item.strip()])
    refuse_unknown_tasks(tasks, is_one_machine=settings.is_one_machine)
    eval_text, *more_texts = _eval_texts(options["eval_texts"] or ("prose",)).items()
    search_text = "" if bound is None else _read_text(str(_search_text()), _EVAL_TEXT_LIMIT)
    time_limit_s = _time_limit_s(settings, options["time_limit"])

    def asked(sources: tuple[SourceRef, ...]) -> Submission:
        return Submission(
            sources=sources,
            grid=grid,
            eval_text=eval_text[1],
            more_texts=dict(more_texts),
            recovery_texts=recovery_texts,
            search_text=search_text,
            tasks=tasks,
            num_fewshot=options["num_fewshot"],
            task_limit=options["task_limit"],
            name=options["name"],
            priority=options["priority"],
            time_limit_s=time_limit_s,
        )

    return asked


def _grid(
    options: Mapping[str, Any],
    measure: Set[MeasuredPart] | None,
    recoveries: tuple[Recovery, ...],
    bound: Bound | None,
) -> Grid:
    """What to do to each model. Raises UsageError."""
    from qbatch.core.methods.registry import every_option
    from qbatch.scheduler.job_grid import Grid

    return Grid(
        bits=joined(options["bits"]),
        quant_types=_quant_types(options["quant_types"]),
        methods=tuple(Method(name) for name in joined(options["schemes"]) if name != AUTO),
        options={option.name: options[option.name] for option in every_option()},
        compute_dtype=DType(options["compute_dtype"]),
        dtype=DType(options["dtype"]),
        device=DeviceKind(options["device"]),
        baseline=options["baseline"],
        force=options["force"],
        skip_modules=joined(options["skip_modules"]),
        max_shard_bytes=options["max_shard_size"],
        allow_pickle=options["allow_pickle"],
        batch_sizes=joined(options["batch_sizes"]),
        prompt_tokens=joined(options["prompt_tokens"]),
        new_tokens=joined(options["new_tokens"]),
        **_parts(measure, why=options["why"], energy=options["energy"]),
        share_speed=None if options["speed"] is None else options["speed"] == OF_A_SHAPE,
        recoveries=recoveries,
        bound=bound,
    )


def _recoveries(options: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Recovery, ...]]:
    """The texts that adapters are made with, and the adapters that were asked for, each once. Raises UsageError."""
    from qbatch.scheduler.submit import text_sha256

    kinds = tuple(dict.fromkeys(joined(options["recover"])))
    ranks = joined(options["recover_rank"]) or (DEFAULT_RANK,)
    file, steps = options["recover_text"], options["recover_steps"]
    is_trained = any(kind.is_trained for kind in kinds)
    if options["recover_rank"] and not kinds:
        raise UsageError("--recover-rank is about adapters, which --recover asks for")
    if not is_trained and (file is not None or steps is not None):
        raise UsageError(f"--recover-text and --recover-steps are for --recover {RecoveryKind.QLORA}")
    if is_trained and (file is None or steps is None):
        raise UsageError(
            f"--recover {RecoveryKind.QLORA} needs a text to train on and a number of steps: --recover-text "
            "FILE --recover-steps N"
        )
    texts: dict[str, str] = {}
    asked = []
    for kind in kinds:
        text = _read_text(file if kind.is_trained else str(_search_text()), _EVAL_TEXT_LIMIT)
        if kind.is_trained and not text.strip():
            raise UsageError(f"the recovery text {file} is empty")
        sha256 = text_sha256(text)
        texts |= {sha256: text} if kind.reads_text else {}
        asked += [Recovery.of(kind, rank, sha256, steps) for rank in ranks]
    return tuple(texts.values()), tuple(dict.fromkeys(asked))


def _bound(options: Mapping[str, Any], *, is_asked: bool) -> Bound | None:
    """What --scheme auto must keep to. Raises UsageError for none or several, and for one without --scheme auto."""
    given = {name: options[name] for name in ("max_kl", "max_ppl_ratio", "max_weights_bytes")}
    if is_asked:
        return Bound(**given)
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} applies only to --scheme auto, which was not asked for")
    return None


def _search_text() -> Path:
    """The text that comes with qbatch for searches and adapters."""
    from qbatch.worker.searching import DEFAULT_SEARCH_TEXT

    return DEFAULT_SEARCH_TEXT


def _is_terminal(models_file: str | None) -> bool:
    """Whether somebody is there to be asked."""
    return models_file != "-" and sys.stdin.isatty() and sys.stderr.isatty()


def _ask_for_folder(name: str, folder: str) -> bool:
    return click.confirm(
        escape_controls(f"There is no folder {name}. Use the folder {folder}, instead of the model {name} of the hub?"),
        default=True,
        err=True,
    )


def _read_list(file: str | None) -> list[str]:
    """The lines of the file that --models names; none without it."""
    if file is None:
        return []
    try:
        is_there, is_folder = file == "-" or Path(file).exists(), Path(file).is_dir()
    except OSError as error:  # the name is too long, or a folder above may not be looked into
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    if not is_there:
        raise UsageError(f"there is no file {file}; --models reads a list of models. {_WITHOUT_A_LIST} {file}")
    if is_folder:
        raise UsageError(f"{file} is a folder; --models reads a list of models. {_WITHOUT_A_LIST} {file}")
    return _read_text(file, _MODEL_LIST_LIMIT).splitlines()


def _eval_texts(values: Sequence[str]) -> dict[str, str]:
    """The texts by name, in the given order. Of a file that is its name without a suffix. Raises UsageError."""
    from qbatch.worker.measuring import EVAL_TEXTS

    texts: dict[str, str] = {}
    for value in values:
        path = EVAL_TEXTS.get(value) or Path(value)
        name = value if value in EVAL_TEXTS else path.stem
        if name in texts:
            raise UsageError(f"two texts are called {name}: --eval-text takes files of different names")
        if value not in EVAL_TEXTS and value != "-" and not path.exists():
            raise UsageError(
                f"there is no text file {value}, and the texts that come with qbatch are {', '.join(EVAL_TEXTS)}"
            )
        texts[name] = _read_text(str(path), _EVAL_TEXT_LIMIT)
    return texts


def _quant_types(values: Sequence[str]) -> tuple[Method, ...]:
    from qbatch.core.methods.registry import quant_types

    known = quant_types()
    names = [name for value in values for name in value.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"{name!r} is not a 4-bit data type (use {' or '.join(known)})")
    return tuple(known[name] for name in dict.fromkeys(names))


def _parts(measure: Set[MeasuredPart] | None, *, why: bool | None, energy: bool | None) -> dict[str, bool | None]:
    """Whether each part of a measurement was asked for; None leaves it to the device's default.

    ``why`` and ``energy`` add a part to ``measure``, and ``False`` contradicts it. Raises UsageError for that.
    """
    if measure is None:
        return {"why": why, "energy": energy}
    for part, is_asked in ((MeasuredPart.WHY, why), (MeasuredPart.ENERGY, energy)):
        if is_asked is False and part in measure:
            raise UsageError(f"--measure asks for {part}, but --no-{part} leaves it out")
        measure = measure | {part} if is_asked else measure
    if MeasuredPart.WHY in measure:  # it explains the speed
        measure = measure | {MeasuredPart.SPEED}
    return {part.value: part in measure for part in MeasuredPart if part is not MeasuredPart.SIZE}


def _time_limit_s(settings: Settings, requested_s: float | None) -> float | None:
    """The time limit to store, in seconds. None means no limit, which a user must ask for with ``none``."""
    limit_s = settings.time_limit_s if requested_s is None else requested_s
    return limit_s if math.isfinite(limit_s) else None


def _read_text(name: str, limit: int) -> str:
    """Read a UTF-8 text file of at most ``limit`` characters; ``-`` is standard input.

    Never reads much further than the limit, so an endless file such as /dev/zero is refused at once.
    Raises UsageError if the file is larger, cannot be read, or is not UTF-8 text.
    """
    try:
        with sys.stdin if name == "-" else Path(name).open(encoding="utf-8") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text") from error
    if not is_unicode(text):  # Python may decode standard input with surrogate escapes instead of failing
        raise UsageError(f"{name} is not UTF-8 text")
    if "\0" in text:
        raise UsageError(f"{name} contains NUL characters, so it is not a text file")
    if len(text) > limit:
        raise UsageError(f"{name} has more than {limit // 2**20} Mi characters, which is the limit")
    return text

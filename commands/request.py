"""Reads what ``submit`` and ``run`` were given: files, options and limits."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbatch.commands.shared_options import OF_A_SHAPE
from qbatch.core.control_characters import is_unicode
from qbatch.core.domain import DeviceKind, DType
from qbatch.core.errors import UsageError
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.methods.registry import Method
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.scheduler.submit import Submission

# In characters. Enough for a list of a hundred thousand models, and for an evaluation text that takes a day to measure.
_MODEL_LIST_LIMIT = 16 * 2**20
_EVAL_TEXT_LIMIT = 64 * 2**20


def read_submission(settings: Settings, options: Mapping[str, Any]) -> Submission:
    """The request that the options of ``submit`` describe. Raises UsageError."""
    from qbatch.core.methods.registry import every_option
    from qbatch.scheduler.job_grid import Grid
    from qbatch.scheduler.lm_eval_files import read_tasks
    from qbatch.scheduler.model_list import read_model_list
    from qbatch.scheduler.submit import Submission
    from qbatch.worker.measuring import DEFAULT_EVAL_TEXT

    grid = Grid(
        bits=options["bits"] or (),
        quant_types=_quant_types(options["quant_types"]),
        methods=tuple(method for listed in options["schemes"] for method in listed),
        options={option.name: options[option.name] for option in every_option()},
        compute_dtype=DType(options["compute_dtype"]),
        dtype=DType(options["dtype"]),
        device=DeviceKind(options["device"]),
        baseline=options["baseline"],
        force=options["force"],
        skip_modules=tuple(pattern for listed in options["skip_modules"] for pattern in listed),
        max_shard_bytes=options["max_shard_size"],
        allow_pickle=options["allow_pickle"],
        batch_sizes=options["batch_sizes"] or (),
        prompt_tokens=options["prompt_tokens"] or (),
        new_tokens=options["new_tokens"] or (),
        **_parts(options["measure"], why=options["why"], energy=options["energy"]),
        share_speed=True if options["speed"] == OF_A_SHAPE else None,
    )
    if options["eval_text"] is not None and options["measure"] == {MeasuredPart.SIZE}:
        raise UsageError("--eval-text is about quality, speed and energy, which --measure leaves out")
    sources = read_model_list(
        _read_list(options["models_file"]),
        named=options["models"],
        check_folders=settings.is_one_machine,
        roots=settings.allowed_roots,
    )
    return Submission(
        sources=tuple(sources),
        grid=grid,
        eval_text=_read_text(str(options["eval_text"] or DEFAULT_EVAL_TEXT), _EVAL_TEXT_LIMIT),
        tasks=read_tasks([item.strip() for value in options["tasks"] for item in value.split(",") if item.strip()]),
        num_fewshot=options["num_fewshot"],
        task_limit=options["task_limit"],
        name=options["name"],
        priority=options["priority"],
        time_limit_s=_time_limit_s(settings, options["time_limit"]),
    )


def _read_list(file: str | None) -> list[str]:
    """The lines of the file that --models names; none without it."""
    if file is None:
        return []
    if file != "-" and not Path(file).exists():
        raise UsageError(f"there is no file {file}; --models reads a list, and models are named without it: {file}")
    if Path(file).is_dir():
        raise UsageError(f"{file} is a folder; --models reads a list, and models are named without it")
    return _read_text(file, _MODEL_LIST_LIMIT).splitlines()


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

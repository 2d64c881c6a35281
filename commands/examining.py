"""``doctor``, ``inspect`` and ``verify``: examine the installation, a model, or checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.completion import complete_loaders, complete_path, complete_target_or_folder
from qbatch.commands.context import current_settings, open_database
from qbatch.commands.shared_options import format_options
from qbatch.commands.targets import find_targets
from qbatch.core.control_characters import escape_controls
from qbatch.core.errors import UsageError

if TYPE_CHECKING:
    from qbatch.core.measured.loader_judgement import LoaderJudgement
    from qbatch.views.checks import Check


@click.command()
@click.option("--deep", is_flag=True, help="Also import the libraries and quantize a weight; takes half a minute.")
@format_options("table", "json", "csv")
def doctor(deep: bool, format_: str) -> None:
    """Check the installation and report problems. Exits with 1 if there are any."""
    from qbatch.scheduler.stack_lock import stack_is_running
    from qbatch.views.checks import State, render_checks
    from qbatch.views.doctor import examine
    from qbatch.views.libraries import VisibleGpu, examine_libraries
    from qbatch.worker.machine.gpu import installed_gpus

    settings = current_settings()
    gpus = [VisibleGpu(name=gpu.name, memory_bytes=gpu.memory_bytes) for gpu in installed_gpus()]
    checks = [*examine(settings, gpus=gpus, stack_runs=stack_is_running(settings))]
    if deep or not gpus:
        checks.append(_cpu_check(measure=deep))
    if deep:
        checks += examine_libraries()
    click.echo(render_checks(checks, format_))
    sys.exit(1 if any(check.state is State.WRONG for check in checks) else 0)


def _cpu_check(*, measure: bool) -> Check:
    """Whether the CPU has 16-bit arithmetic of its own. Measures it, which imports torch, only if the system does not
    say so."""
    from qbatch.views.checks import State, check
    from qbatch.views.emulation import arithmetic_check, native_check
    from qbatch.worker.machine.cpu_arithmetic import bfloat16_instructions, measured_apart
    from qbatch.worker.machine.processor import cpuinfo

    instructions = bfloat16_instructions(cpuinfo(), os.environ)
    if instructions is not None and not measure:
        return native_check(instructions)
    try:
        return arithmetic_check(measured_apart())
    except RuntimeError as error:
        return check("cpu", State.WRONG, f"torch cannot multiply matrices here: {error}")


@click.command()
@click.argument("model", shell_complete=complete_path)
@format_options("table", "json", "csv")
def inspect(model: str, format_: str) -> None:
    """Show a model's dtype, parameter count and size, read from its file headers alone."""
    from qbatch.core.errors import FetchError, JobError, ServiceUnreachable
    from qbatch.core.inspection import inspect_source
    from qbatch.core.sources import parse_source
    from qbatch.views.formats import render
    from qbatch.views.model_description import inspection_table

    try:
        description = inspect_source(parse_source(model))
    except FetchError as error:
        raise ServiceUnreachable(f"{model}: {error}") from error
    except JobError as error:
        raise UsageError(f"{model}: {error}") from error
    click.echo(inspection_table(description) if format_ == "table" else render([description], (), format_))


@click.command()
@click.argument("targets", nargs=-1, metavar="[CHECKPOINT|BATCH|JOB]...", shell_complete=complete_target_or_folder)
@click.option(
    "--for",
    "loaders",
    multiple=True,
    metavar="LOADERS",
    shell_complete=complete_loaders,
    help="Report instead how these loaders would load the checkpoints, judged from config, headers and tensor names "
    "alone: transformers, peft, fsdp, vllm, sglang, gguf, sentence-transformers. Separate several "
    "with commas; may be repeated.",
)
@click.option(
    "--try",
    "tries",
    is_flag=True,
    help="With --for: also load the checkpoints with transformers, peft, sentence-transformers and vllm, and compare "
    "what they predict for three prompts with what was measured.",
)
@click.option(
    "--python",
    metavar="PATH",
    shell_complete=complete_path,
    help="With --try: the interpreter of an environment in which the loaders are installed.",
)
@format_options("table", "json", "csv")
def verify(targets: Sequence[str], loaders: Sequence[str], tries: bool, python: str | None, format_: str) -> None:
    """Check published checkpoints: every file against the manifest, the tensors against the config.

    CHECKPOINT is a folder. Without arguments, all recorded checkpoints are checked. Exits with 1 if one is damaged, or
    was removed from the storage: that is recorded, so it is said once.

    With --for, reports for each loader whether it loads a checkpoint as it was measured, loads it differently, or
    refuses it. Exits with 1 unless every loader loads every checkpoint as it was measured.
    """
    from qbatch.views.formats import render
    from qbatch.views.listings import VERIFY_COLUMNS
    from qbatch.worker.checkpoints.verify import verify as problems_of

    if (tries and not loaders) or (python is not None and not tries):
        raise UsageError("--python needs --try, and --try needs --for with the loaders to try")
    if loaders:
        _judge(_checkpoint_folders(targets), ",".join(loaders), format_, (python or sys.executable) if tries else None)
        return
    rows: list[dict[str, Any]] = []
    for folder in _checkpoint_folders(targets):
        problems = problems_of(folder)
        state = "sound" if not problems else "damaged" if folder.is_dir() else "gone"
        rows.append({"checkpoint": str(folder), "state": state, "problems": problems})
        if state == "damaged" and format_ == "table":
            click.echo("\n".join(escape_controls(f"{folder}: {problem}") for problem in problems), err=True)
    click.echo(render(rows, VERIFY_COLUMNS, format_))
    damaged = [Path(row["checkpoint"]) for row in rows if row["state"] == "damaged"]
    if damaged and _any_is_ours(damaged):
        click.echo(
            "to replace a damaged checkpoint, submit its job again with --force: the damaged one is moved aside",
            err=True,
        )
    sys.exit(1 if any(row["problems"] for row in rows) else 0)


def _any_is_ours(folders: Sequence[Path]) -> bool:
    """Whether this database has one of them on record, so that its job can replace it. Others are somebody's copies."""
    from qbatch.models_db.checkpoints import checkpoints_at

    settings = current_settings()
    storage = settings.storage.resolve()
    paths = [str(path.relative_to(storage)) for folder in folders if (path := folder.resolve()).is_relative_to(storage)]
    if not paths:
        return False
    with open_database(settings).read() as session:
        return bool(checkpoints_at(session, paths))


def _judge(folders: Sequence[Path], loaders: str, format_: str, python: str | None) -> None:
    """Print what the loaders do with the checkpoints. ``python`` is the interpreter to try them with; None to try
    nothing."""
    from qbatch.commands.loader_names import parse_loaders
    from qbatch.core.errors import JobError
    from qbatch.core.loaders.known_loaders import judge_folder
    from qbatch.core.measured.loader_judgement import LoaderVerdict
    from qbatch.core.storage import base_path
    from qbatch.views.formats import render
    from qbatch.views.loader_judgements import JudgedCheckpoint, judgement_text

    names = parse_loaders(loaders)
    judged: list[JudgedCheckpoint] = []
    for folder in folders:
        if (base := base_path(folder.name)) is not None:
            click.echo(escape_controls(f"{folder} is left out: it is an adapter, for PEFT to load on {base}"), err=True)
            continue
        try:
            judgements = judge_folder(folder, names)
            tried = _try(folder, names, python) if python is not None else {}
        except JobError as error:
            raise UsageError(f"{folder}: {error}") from error
        judged += [
            JudgedCheckpoint(folder=folder, loader=name, judged=judgement, tried=tried.get(name))
            for name, judgement in judgements.items()
        ]
    rows = [judgement.to_json() for judgement in judged]
    click.echo(judgement_text(judged) if format_ == "table" else render(rows, (), format_))
    sys.exit(0 if all(judgement.shown.verdict == LoaderVerdict.LOADS for judgement in judged) else 1)


def _try(folder: Path, names: Sequence[str], python: str) -> Mapping[str, LoaderJudgement]:
    from qbatch.worker.checkpoints.trying.tried_loaders import try_loaders
    from qbatch.worker.models.forbidden_code import refuse_forbidden_code

    if not Path(python).is_file():
        raise UsageError(f"{python} is not an interpreter")
    refuse_forbidden_code(folder, trusted=False)
    return try_loaders(folder, names, python=python)


def _checkpoint_folders(targets: Sequence[str]) -> list[Path]:
    from qbatch.models_db.checkpoints import all_checkpoints, checkpoints_of
    from qbatch.models_db.gone_checkpoints import note_missing

    folders = [Path(target).absolute() for target in targets if Path(target).is_dir()]
    words = [target for target in targets if not Path(target).is_dir()]
    if targets and not words:
        return folders
    if paths := [word for word in words if "/" in word]:
        raise UsageError(f"no such folder: {paths[0]}")
    settings = current_settings()
    database = open_database(settings)
    wanted = find_targets(database, words)
    # What was noticed just now is said once more, as it fails what was asked.
    new = note_missing(database, settings.storage)
    for path in sorted(new):
        click.echo(
            f"{settings.storage / path} was removed: that is recorded now; a new submit makes it again", err=True
        )
    with database.read() as session:
        checkpoints = checkpoints_of(session, wanted.batch_ids, wanted.job_ids) if words else all_checkpoints(session)
        chosen = [one.path for one in checkpoints if one.gone_at is None or one.path in new]
    if words and not chosen:
        click.echo(f"{', '.join(words)}: no checkpoint is recorded that is still there", err=True)
    return folders + [settings.storage / path for path in chosen]

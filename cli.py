"""The command line: parse, one call, print. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from qbatch.cli_options import (
    ON_A_TERMINAL,
    Bits,
    Duration,
    compare_options,
    format_options,
    limit_option,
    submit_options,
)
from qbatch.core.control_characters import escape_controls, is_unicode
from qbatch.core.domain import DeviceKind, DType, JobState, format_batch_id, format_job_id, parse_id
from qbatch.core.errors import BrokerUnreachable, QbatchError, StackNotRunning, UsageError
from qbatch.core.methods.registry import Method
from qbatch.core.settings import Settings

if __name__ != "qbatch.cli":
    raise ImportError("import this module as qbatch.cli, not under another name")

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from qbatch.core.measured.result_row import ResultRow
    from qbatch.models_db.session import Database
    from qbatch.scheduler.local_stack import LocalStack
    from qbatch.scheduler.submit import Receipt, Submission
    from qbatch.views.checks import Check

_INTERRUPTED = 130
_OBJECTS_BETWEEN_COLLECTIONS = 20_000
# In characters. Enough for a list of a hundred thousand models, and for an evaluation text that takes a day to measure.
_MODEL_LIST_LIMIT = 16 * 2**20
_EVAL_TEXT_LIMIT = 64 * 2**20


class _Group(click.Group):
    """Turns a domain error into one line and its exit code; never a traceback for what a user can cause."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # What a short command makes are modules, which stay: to look for garbage among them takes a tenth of its time.
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
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
            click.echo(f"qbatch: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qbatch")
def main() -> None:
    """Quantize models in batches, benchmark them, and see which to ship."""
    from qbatch.scheduler.child_process import hide_from_equals

    hide_from_equals()


@main.command()
@submit_options
@click.option("--wait", "wait_", is_flag=True, help="Wait until every job has finished.")
def submit(format_: str, wait_: bool, **options: Any) -> None:
    """Store a batch of quantize-and-benchmark jobs and print its id."""
    settings = _settings()
    submission = _submission(settings, options)
    database = _database(settings)
    receipt, hint = _store(database, settings, submission)
    batch = format_batch_id(receipt.batch_id)
    if hint is not None:
        click.echo(hint, err=True)
    if wait_ and hint is not None:
        _print_receipt(receipt, format_)
        raise StackNotRunning(f"{batch} is stored, but nothing is running that could work on it: not waiting for it")
    if wait_:
        click.echo(f"{batch}: {receipt.jobs} jobs", err=True)
        all_succeeded = _wait(database, settings, [receipt.batch_id], quiet=format_ == "quiet")
        _print_outcome(database, settings, receipt, format_)
        sys.exit(0 if all_succeeded else 1)
    _print_receipt(receipt, format_)


@main.command()
@submit_options
def run(format_: str, **options: Any) -> None:
    """Submit a batch, run it here, and print the results.

    Starts the embedded stack (Redis, scheduler, workers) unless one is already running or QBATCH_BROKER_URL is
    set. Stops what it started when the batch has finished.
    """
    from qbatch.scheduler.stack_lock import stack_is_running

    settings = _settings()
    submission = _submission(settings, options)
    if not settings.is_embedded or stack_is_running(settings):
        sys.exit(_run(settings, submission, format_, stack=None))
    _interrupt_on_signals()
    with _local_stack(settings, device=DeviceKind(options["device"])) as stack:
        code = _run(settings, submission, format_, stack=stack)
    sys.exit(code)


def _run(settings: Settings, submission: Submission, format_: str, stack: LocalStack | None) -> int:
    database = _database(settings)
    receipt, hint = _store(database, settings, submission)
    batch = format_batch_id(receipt.batch_id)
    click.echo(f"{batch}: {receipt.jobs} jobs, {receipt.answered} answered by earlier results", err=True)
    if hint is not None and stack is None:
        click.echo(hint, err=True)
        raise StackNotRunning(f"{batch} is stored, but nothing is running that could work on it: not waiting for it")
    tend = stack.tend if stack is not None else None
    try:
        all_succeeded = _wait(database, settings, [receipt.batch_id], quiet=format_ == "quiet", on_poll=tend)
    except KeyboardInterrupt:
        click.echo(
            f"stopped; {batch} is stored: `qbatch up` continues it, `qbatch cancel {batch}` cancels it", err=True
        )
        return _INTERRUPTED
    _print_outcome(database, settings, receipt, format_)
    return 0 if all_succeeded else 1


@main.command()
@click.option("--gpus", help="all, or GPU indices or UUIDs separated by commas.  [default: all, or the CPU]")
@click.option("--cpu", is_flag=True, help="Start one CPU worker.")
def up(gpus: str | None, cpu: bool) -> None:
    """Run the embedded stack in the foreground until Ctrl-C."""
    import time

    settings = _settings()
    _interrupt_on_signals()
    with _stack(settings, gpus, cpu) as stack:
        click.echo(f"qbatch is running with its home in {settings.home}; press Ctrl-C to stop it", err=True)
        try:
            while True:
                stack.tend()
                time.sleep(0.5)
        except KeyboardInterrupt:
            click.echo("stopping: running jobs return to the queue", err=True)


@main.command()
@click.option("--gpus", help="all, or GPU indices or UUIDs separated by commas.  [default: all, or the CPU]")
@click.option("--cpu", is_flag=True, help="Start one CPU worker.")
@click.option("--drain", is_flag=True, help="On SIGTERM, finish running jobs instead of returning them to the queue.")
def worker(gpus: str | None, cpu: bool, drain: bool) -> None:
    """Run one worker for each GPU of this machine, or one CPU worker."""
    from qbatch.worker.serving.launch import main as launch

    _settings()
    sys.exit(launch(gpus, cpu, drain))


@main.command()
def scheduler() -> None:
    """Run the scheduler. Several may run at once; only one is active."""
    from qbatch.scheduler.__main__ import main as run_scheduler

    sys.exit(run_scheduler())


@main.command()
@click.argument("batch", required=False)
@limit_option("jobs, or batches (the newest)")
@format_options("table", "json", "csv")
def status(batch: str | None, limit: int | None, format_: str) -> None:
    """Show the batches, or one batch and its jobs."""
    from qbatch.models_db.listing import count_batches, list_batches
    from qbatch.models_db.pauses import standing
    from qbatch.views.formats import render
    from qbatch.views.listings import BATCH_COLUMNS

    ids = _batch_ids([batch] if batch else [])
    database = _database(_settings())
    _require_batches(database, ids)
    limit = _limit(limit, format_)
    with database.read() as session:
        batches = list_batches(session, ids, limit=limit)
        click.echo(render(batches, BATCH_COLUMNS, format_))
        if limit is not None and not ids:
            _tell_of_rest("newest", len(batches), count_batches(session), "batches")
        for pause in standing(session):
            click.echo(f"no jobs are sent to the workers until disk space is free: {pause.message}", err=True)
        if ids and format_ == "table":
            _print_jobs(session, ids, (), limit, format_)


@main.command()
@click.option("--batch", "batches", multiple=True, metavar="BATCH", help="Only jobs of this batch; may be repeated.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in JobState]),
    help="Only jobs in this state; may be repeated.",
)
@limit_option("jobs")
@format_options("table", "json", "csv")
def jobs(batches: Sequence[str], states: Sequence[str], limit: int | None, format_: str) -> None:
    """List jobs."""
    ids = _batch_ids(batches)
    database = _database(_settings())
    _require_batches(database, ids)
    with database.read() as session:
        _print_jobs(session, ids, states, _limit(limit, format_), format_)


def _print_jobs(
    session: Session, batch_ids: Sequence[int], states: Sequence[str], limit: int | None, format_: str
) -> None:
    from qbatch.models_db.job_pages import count_jobs
    from qbatch.models_db.listing import list_jobs
    from qbatch.views.formats import render
    from qbatch.views.listings import JOB_COLUMNS

    found = list_jobs(session, batch_ids=batch_ids, states=states, limit=limit)
    click.echo(render(found, JOB_COLUMNS, format_))
    if limit is not None and len(found) == limit:
        _tell_of_rest("first", limit, count_jobs(session, batch_ids=batch_ids, states=states), "jobs")


def _limit(limit: int | None, format_: str) -> int | None:
    """How many rows to show: what was asked for, else a screenful where somebody looks, and all for a program."""
    return ON_A_TERMINAL if limit is None and format_ == "table" and sys.stdout.isatty() else limit


def _tell_of_rest(which: str, shown: int, total: int, rows: str) -> None:
    if shown < total:
        click.echo(f"the {which} {shown} of {total} {rows}; --limit {total} shows all", err=True)


@main.command()
@click.argument("targets", nargs=-1, required=True, metavar="BATCH|JOB...")
def cancel(targets: Sequence[str]) -> None:
    """Cancel batches or jobs. Running jobs are stopped; finished jobs stay as they are."""
    from qbatch.models_db.jobs import cancel as cancel_jobs

    _change(targets, cancel_jobs, "cancelled")


@main.command()
@click.argument("targets", nargs=-1, required=True, metavar="BATCH|JOB...")
def retry(targets: Sequence[str]) -> None:
    """Queue failed and cancelled jobs again."""
    from qbatch.models_db.jobs import retry as retry_jobs

    database, settings, changed = _change(targets, retry_jobs, "queued again")
    if changed:
        hint = _send(database, settings)
        if hint is not None:
            click.echo(hint, err=True)


@main.command()
@click.argument("batches", nargs=-1, required=True, metavar="BATCH...")
@click.option("--timeout", type=Duration(), help="Stop waiting after this long and exit with 4: 30s, 10m, 2h.")
def wait(batches: Sequence[str], timeout: float | None) -> None:
    """Wait until every job of the batches has finished."""
    settings = _settings()
    ids = _batch_ids(batches)
    database = _database(settings)
    _require_batches(database, ids)
    sys.exit(0 if _wait(database, settings, ids, timeout_s=timeout) else 1)


@main.command()
@click.option("--batch", "batches", multiple=True, metavar="BATCH", help="Only jobs of this batch; may be repeated.")
@click.option("--model", help="Only models whose name contains this text.")
@click.option("--bits", type=Bits(), default=(), help="Only these bit widths, separated by commas: 4,8.")
@click.option("--sort", metavar="COLUMN", help="Sort by a column of the JSON output; -COLUMN sorts descending.")
@click.option("--limit", type=click.IntRange(1, 2**31 - 1), metavar="INTEGER", help="Show at most this many rows.")
@format_options("table", "json", "csv")
def results(
    batches: Sequence[str], model: str | None, bits: tuple[int, ...], sort: str | None, limit: int | None, format_: str
) -> None:
    """Show the measurements of each quantized model next to those of its baseline."""
    from qbatch.models_db.results import find_results

    ids = _batch_ids(batches)
    settings = _settings()
    database = _database(settings)
    _require_batches(database, ids)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, model=model, bits=bits, sort=sort, limit=limit)
    _print_results(settings, rows, format_)


@main.command()
@compare_options
@format_options("table", "json", "csv")
def compare(batches: Sequence[str], model: str | None, by: str, format_: str, **preference: Any) -> None:
    """Compare each model's quantization schemes and recommend one.

    Results of different protocols or devices are listed separately. If you set no limit on quality, a default limit
    is used and shown.
    """
    from qbatch.models_db.results import find_results
    from qbatch.views.compare import comparison
    from qbatch.views.comparison import Preference

    ids = _batch_ids(batches)
    settings = _settings()
    database = _database(settings)
    _require_batches(database, ids)
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, model=model)
    click.echo(comparison(_placed(settings, rows), Preference(**preference), by=by, format=format_))


@main.command()
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@format_options("table", "json", "csv")
def show(jobs: Sequence[str], format_: str) -> None:
    """Show everything about a job: attempts, scheme, protocol, measurements, audit, and what limits its speed."""
    from qbatch.models_db.job_record import whole_jobs
    from qbatch.views.formats import render
    from qbatch.views.job_details import show_jobs

    ids = _job_ids(jobs)
    settings = _settings()
    database = _database(settings)
    _require_jobs(database, ids)
    with database.read() as session:
        found = whole_jobs(session, ids)
    rows = _placed(settings, [job.row for job in found])
    placed = [replace(job, row=row) for job, row in zip(found, rows, strict=True)]
    click.echo(show_jobs(placed) if format_ == "table" else render([job.to_json() for job in placed], (), format_))


@main.command()
@click.option("--deep", is_flag=True, help="Also import the libraries and quantize a weight; takes half a minute.")
@format_options("table", "json", "csv")
def doctor(deep: bool, format_: str) -> None:
    """Check the installation and report problems. Exits with 1 if there are any."""
    from qbatch.scheduler.stack_lock import stack_is_running
    from qbatch.views.checks import State, render_checks
    from qbatch.views.doctor import examine
    from qbatch.views.libraries import VisibleGpu, examine_libraries
    from qbatch.worker.machine.gpu import installed_gpus

    settings = _settings()
    gpus = [VisibleGpu(name=gpu.name, memory_bytes=gpu.memory_bytes) for gpu in installed_gpus()]
    checks = [*examine(settings, gpus=gpus, stack_runs=stack_is_running(settings))]
    if deep or not gpus:
        checks.append(_cpu_check(measure=deep))
    if deep:
        checks += examine_libraries()
    click.echo(render_checks(checks, format_))
    sys.exit(1 if any(check.state is State.WRONG for check in checks) else 0)


def _cpu_check(*, measure: bool) -> Check:
    """Whether the CPU computes in 16 bits by itself. Measuring imports torch: only where that is not plain to see."""
    from qbatch.views.arithmetic import arithmetic_check, native_check
    from qbatch.views.checks import State, check
    from qbatch.worker.machine.cpu_arithmetic import bfloat16_instructions, cpuinfo, measured_apart

    instructions = bfloat16_instructions(cpuinfo(), os.environ)
    if instructions is not None and not measure:
        return native_check(instructions)
    try:
        return arithmetic_check(measured_apart())
    except RuntimeError as error:
        return check("cpu", State.WRONG, f"torch cannot multiply matrices here: {error}")


@main.command()
@format_options("table", "json", "csv")
def workers(format_: str) -> None:
    """List the workers, their devices, and what they are working on."""
    from qbatch.models_db.listing import list_workers
    from qbatch.views.formats import render
    from qbatch.views.listings import WORKER_COLUMNS

    settings = _settings()
    with _database(settings).read() as session:
        click.echo(render(list_workers(session, settings.lease_s), WORKER_COLUMNS, format_))


@main.command()
@click.argument("model")
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


@main.command()
@click.argument("targets", nargs=-1, metavar="[CHECKPOINT|BATCH]...")
@format_options("table", "json", "csv")
def verify(targets: Sequence[str], format_: str) -> None:
    """Check published checkpoints: every file against the manifest, the tensors against the config.

    CHECKPOINT is a folder. Without arguments, all recorded checkpoints are checked. Exits with 1 if one is damaged.
    """
    from qbatch.views.formats import render
    from qbatch.views.listings import VERIFY_COLUMNS
    from qbatch.worker.checkpoints.verify import verify as problems_of

    rows = []
    for folder in _checkpoint_folders(targets):
        problems = problems_of(folder)
        rows.append({"checkpoint": str(folder), "state": "damaged" if problems else "sound", "problems": problems})
        if problems and format_ == "table":
            click.echo("\n".join(escape_controls(f"{folder}: {problem}") for problem in problems), err=True)
    click.echo(render(rows, VERIFY_COLUMNS, format_))
    if any(row["problems"] for row in rows):
        click.echo(
            "to replace a damaged checkpoint, submit its job again with --force: the damaged one is moved aside",
            err=True,
        )
        sys.exit(1)


@main.command()
@click.option(
    "--older-than", type=Duration(), required=True, help="Remove batches that finished longer ago than this: 30d, 12h."
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@format_options("table", "json", "csv")
def prune(older_than: float, dry_run: bool, format_: str) -> None:
    """Remove old batches with their logs, damaged checkpoints, unused baseline outputs and old file checksums.

    Checkpoints are kept, and so are jobs whose results are reused by jobs that stay. Workers may run meanwhile.
    """
    from qbatch.views.formats import render
    from qbatch.views.listings import PRUNE_COLUMNS
    from qbatch.worker.files.prune import prune as prune_old

    settings = _settings()
    pruned = prune_old(_database(settings), settings, older_than, dry_run=dry_run)
    click.echo(render([kind.to_json() for kind in pruned], PRUNE_COLUMNS, format_))
    problems = [problem for kind in pruned for problem in kind.problems]
    for problem in problems:
        click.echo(problem, err=True)
    if dry_run:
        click.echo("nothing was removed: this was a dry run", err=True)
    sys.exit(1 if problems else 0)


@main.group()
def db() -> None:
    """Maintain the database."""


@db.command()
def upgrade() -> None:
    """Upgrade the database to the schema of this version."""
    from qbatch.models_db.schema import upgrade as upgrade_schema

    database = _connected(_settings())
    upgrade_schema(database)
    click.echo(f"{database.place} now has schema {database.schema_version()}", err=True)


@main.command()
@click.option("--address", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=5555, show_default=True, help="The port to listen on.")
def flower(address: str, port: int) -> None:
    """Serve Flower, a web page that shows the queue. Requires QBATCH_FLOWER_AUTH=user:password."""
    from qbatch.scheduler.flower import serve

    serve(_settings(), address=address, port=port)


def _settings() -> Settings:
    return Settings.from_env(os.environ)


def _database(settings: Settings) -> Database:
    """Connect to the database and require this version's schema. An SQLite file is created or upgraded if necessary."""
    database = _connected(settings)
    if database.is_sqlite and database.is_behind():
        from qbatch.models_db.schema import upgrade as upgrade_schema

        upgrade_schema(database)
    database.require_schema()
    return database


def _connected(settings: Settings) -> Database:
    """Connect to the database without checking its schema.

    Raises DatabaseOfAnotherHost for an SQLite file that another host is using.
    """
    from qbatch.models_db.network_share import share_of
    from qbatch.models_db.session import Database

    database = Database(settings.sqlalchemy_url)
    share = share_of(database.file)
    if share is not None:
        share.check(settings.lease_s)
    return database


def _quant_types(values: Sequence[str]) -> tuple[Method, ...]:
    from qbatch.core.methods.registry import quant_types

    known = quant_types()
    names = [name for value in values for name in value.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"{name!r} is not a 4-bit data type (use {' or '.join(known)})")
    return tuple(known[name] for name in dict.fromkeys(names))


def _submission(settings: Settings, options: Mapping[str, Any]) -> Submission:
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
        why=options["why"],
        energy=options["energy"],
    )
    lines = _read_text(options["models_file"], _MODEL_LIST_LIMIT).splitlines()
    return Submission(
        sources=tuple(read_model_list(lines, check_folders=settings.is_one_machine, roots=settings.allowed_roots)),
        grid=grid,
        eval_text=_read_text(str(options["eval_text"] or DEFAULT_EVAL_TEXT), _EVAL_TEXT_LIMIT),
        tasks=read_tasks([item.strip() for value in options["tasks"] for item in value.split(",") if item.strip()]),
        num_fewshot=options["num_fewshot"],
        task_limit=options["task_limit"],
        name=options["name"],
        priority=options["priority"],
        time_limit_s=_time_limit_s(settings, options["time_limit"]),
    )


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


def _store(database: Database, settings: Settings, submission: Submission) -> tuple[Receipt, str | None]:
    """Store a batch and send it to the workers.

    Returns the receipt, and None or, if nothing can run the batch now, a sentence that says what will.
    """
    from qbatch.scheduler.submit import submit as store

    receipt = store(database, settings, submission)
    if receipt.outdated:
        click.echo(
            f"{receipt.outdated} jobs are measured again: qbatch 0.1.0, which measured them before, identified models "
            "by the sizes and modification times of their files, not by their content",
            err=True,
        )
    return receipt, _send(database, settings) if _has_work(receipt) else None


def _has_work(receipt: Receipt) -> bool:
    return receipt.answered < receipt.jobs


def _send(database: Database, settings: Settings) -> str | None:
    """Send queued jobs to the workers. If that is not possible, return a sentence that says what will send them."""
    from qbatch.scheduler.stack_lock import stack_is_running
    from qbatch.scheduler.submit import send_now

    if settings.is_embedded and not stack_is_running(settings):
        return "stored, but no stack is running here: start one with `qbatch up` to run it"
    try:
        send_now(database, settings)
    except BrokerUnreachable as error:
        return f"stored, but {error}: the scheduler will send it when Redis is back"
    return None


def _local_stack(settings: Settings, *, device: DeviceKind) -> LocalStack:
    def announce() -> None:
        logs = settings.home / "logs"
        click.echo(f"starting Redis, the scheduler and the workers; their logs are in {logs}", err=True)

    return _stack(settings, "all" if device is DeviceKind.CUDA else None, device is DeviceKind.CPU, on_start=announce)


def _stack(settings: Settings, gpus: str | None, cpu: bool, on_start: Callable[[], None] = lambda: None) -> LocalStack:
    from qbatch.models_db.network_share import share_of
    from qbatch.models_db.session import Database
    from qbatch.scheduler.local_stack import LocalStack
    from qbatch.worker.serving.launch import devices_for

    if not settings.is_embedded:
        raise UsageError("QBATCH_BROKER_URL is set: start `qbatch scheduler` and `qbatch worker` instead")
    devices_for(gpus, cpu, os.environ)  # raises now what the workers would raise later
    share = share_of(Database(settings.sqlalchemy_url).file)
    if share is not None:
        click.echo(share.warning, err=True)
        share.hold(settings.lease_s)
    worker_args = [*(["--gpus", gpus] if gpus is not None else []), *(["--cpu"] if cpu else [])]
    return LocalStack(settings, worker_args=worker_args, environ=os.environ, on_start=on_start)


def _wait(
    database: Database,
    settings: Settings,
    batch_ids: Sequence[int],
    *,
    timeout_s: float | None = None,
    quiet: bool = False,
    on_poll: Callable[[], None] | None = None,
) -> bool:
    from qbatch.scheduler.wait import wait as wait_for
    from qbatch.views.live import LiveProgress

    # Whoever tends the stack has just started it: nobody needs to be told to start a worker.
    with LiveProgress(quiet=quiet, starts_workers=on_poll is not None) as progress:
        return wait_for(
            database,
            batch_ids,
            lease_s=settings.lease_s,
            timeout_s=timeout_s,
            on_update=progress.update,
            on_poll=on_poll or _nothing,
        )


def _nothing() -> None:
    return None


def _print_receipt(receipt: Receipt, format_: str) -> None:
    batch = format_batch_id(receipt.batch_id)
    if format_ == "quiet":
        click.echo(batch)
    elif format_ == "json":
        import json

        click.echo(
            json.dumps(
                {
                    "batch_id": batch,
                    "jobs": receipt.jobs,
                    "answered": receipt.answered,
                    "live_workers": receipt.live_workers,
                    "outdated": receipt.outdated,
                }
            )
        )
    else:
        click.echo(f"{batch}: {receipt.jobs} jobs, {receipt.answered} answered by earlier results")


def _print_outcome(database: Database, settings: Settings, receipt: Receipt, format_: str) -> None:
    from qbatch.models_db.results import find_results

    if format_ == "quiet":
        click.echo(format_batch_id(receipt.batch_id))
        return
    with database.read() as session:
        rows = find_results(session, batch_ids=[receipt.batch_id])
    _print_results(settings, rows, format_)


def _print_results(settings: Settings, rows: Sequence[ResultRow], format_: str) -> None:
    from qbatch.views.formats import render
    from qbatch.views.results_table import results_table

    rows = _placed(settings, rows)
    click.echo(results_table(rows) if format_ == "table" else render([row.to_json() for row in rows], (), format_))


def _placed(settings: Settings, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """With the whole paths of checkpoints: they are stored relative to the storage, which may be mounted elsewhere on
    each machine."""
    paths = [None if row.checkpoint_path is None else str(settings.storage / row.checkpoint_path) for row in rows]
    return [replace(row, checkpoint_path=path) for row, path in zip(rows, paths, strict=True)]


def _checkpoint_folders(targets: Sequence[str]) -> list[Path]:
    from qbatch.models_db.checkpoints import all_checkpoints, checkpoints_of

    folders = [Path(target).absolute() for target in targets if Path(target).is_dir()]
    for target in targets:
        if not Path(target).is_dir() and not target.startswith("b"):
            raise UsageError(f"{target!r} is neither a checkpoint folder nor a batch id such as b12")
    batch_ids = _batch_ids([target for target in targets if not Path(target).is_dir()])
    if targets and not batch_ids:
        return folders
    settings = _settings()
    database = _database(settings)
    _require_batches(database, batch_ids)
    with database.read() as session:
        checkpoints = checkpoints_of(session, batch_ids) if batch_ids else all_checkpoints(session)
        return folders + [settings.storage / checkpoint.path for checkpoint in checkpoints]


def _batch_ids(texts: Sequence[str]) -> list[int]:
    parsed = [parse_id(text) for text in texts]
    for text, (kind, _) in zip(texts, parsed, strict=True):
        if kind != "b":
            raise UsageError(f"{text} is a job id; this command takes batch ids such as b12")
    return [number for _, number in parsed]


def _job_ids(texts: Sequence[str]) -> list[int]:
    parsed = [parse_id(text) for text in texts]
    for text, (kind, _) in zip(texts, parsed, strict=True):
        if kind != "j":
            raise UsageError(f"{text} is a batch id; this command takes job ids such as j345")
    return [number for _, number in parsed]


def _require_batches(database: Database, batch_ids: Sequence[int]) -> None:
    from qbatch.models_db.batches import batch_exists

    with database.read() as session:
        for batch_id in batch_ids:
            if not batch_exists(session, batch_id):
                raise UsageError(f"no such batch: {format_batch_id(batch_id)}")


def _require_jobs(database: Database, job_ids: Sequence[int]) -> None:
    from qbatch.models_db.batches import job_exists

    with database.read() as session:
        for job_id in job_ids:
            if not job_exists(session, job_id):
                raise UsageError(f"no such job: {format_job_id(job_id)}")


def _change(
    targets: Sequence[str], change: Callable[..., list[int]], done: str
) -> tuple[Database, Settings, list[int]]:
    settings = _settings()
    parsed = [parse_id(text) for text in targets]
    batch_ids = [number for kind, number in parsed if kind == "b"]
    job_ids = [number for kind, number in parsed if kind == "j"]
    database = _database(settings)
    _require_batches(database, batch_ids)
    _require_jobs(database, job_ids)
    with database.write() as session:
        changed = change(session, batch_ids=batch_ids, job_ids=job_ids)
    for job_id in changed:
        click.echo(format_job_id(job_id))
    click.echo(f"{len(changed)} jobs {done}", err=True)
    return database, settings, changed


def _interrupt_on_signals() -> None:
    """Handle SIGTERM like Ctrl-C, and enable Ctrl-C even in a process that a shell started with ``&``."""
    import signal

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


if __name__ == "__main__":
    main()

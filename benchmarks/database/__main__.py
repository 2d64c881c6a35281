"""Times qbatch on a database with a long history.

    python -m benchmarks.database
    python -m benchmarks.database --jobs 900000 --large 50000 --queued 90000
    python -m benchmarks.database --postgresql postgresql://me@host/empty_database

Fills a SQLite file and a PostgreSQL database (one of its own, unless a URL is given) by bulk inserts. Then it times the
transactions of scheduler and workers, and commands, each in a process of its own. ``beyond imports`` is the CPU time of
a command less that of the same command on a database of a dozen jobs. With ``--keep``, the filled SQLite file and a
PostgreSQL of a given URL are left for the next run, which upgrades them to the schema of its version and says how long
that took.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import text

from benchmarks.database.command import least
from benchmarks.database.history import Sizes, fill, first_result, large_batch
from benchmarks.database.transactions import LEASE_S, time_transactions
from benchmarks.submit_many import database_url
from qbatch.core.domain import format_batch_id, format_job_id
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import SCHEMA_HEAD, Database

_TINY = "qbatch_tiny.db"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300_000, help="in all")
    parser.add_argument("--large", type=int, default=30_000, help="models of one large ended batch")
    parser.add_argument("--queued", type=int, default=90_000, help="jobs of the backlog")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--postgresql", metavar="URL", help="an empty database, or one that this benchmark has filled")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the SQLite file is made, or was left")
    arguments = parser.parse_args()
    sizes = Sizes(jobs=arguments.jobs, large=arguments.large, queued=arguments.queued)
    with _folder(arguments.keep) as folder:
        if arguments.only != "postgresql":
            _measure(f"sqlite:///{folder / 'qbatch.db'}", folder, sizes, arguments.repeats)
        if arguments.only != "sqlite":
            server = nullcontext(arguments.postgresql) if arguments.postgresql else database_url("postgresql", folder)
            with server as url:
                _measure(url, folder, sizes, arguments.repeats)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="qbatch-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _measure(url: str, folder: Path, sizes: Sizes, repeats: int) -> None:
    database = Database(url)
    _prepare(database, sizes)
    large = large_batch(database)
    print(f"\n{'transaction':32} {'ms':>9} {'CPU ms here':>12}", flush=True)
    for timed in time_transactions(database, folder, large, repeats):
        print(f"{timed.name:32} {1000 * timed.wall_s:9.1f} {1000 * timed.cpu_s:12.1f}", flush=True)
    _time_commands(url, folder, database, repeats)
    database.dispose()


def _time_commands(url: str, folder: Path, database: Database, repeats: int) -> None:
    tiny_url = _tiny(database, folder)
    tiny = Database(tiny_url)
    commands = zip(_commands(database), _commands(tiny), strict=True)
    tiny.dispose()
    print(f"\n{'command':42} {'CPU s':>6} {'beyond imports':>14} {'wall s':>7} {'peak MiB':>9} {'KiB printed':>11}")
    for command, on_tiny in commands:
        taken = least(command, _environ(url, folder), repeats)
        alone = least(on_tiny, _environ(tiny_url, folder), repeats)
        print(
            f"{'qbatch ' + ' '.join(command):42} {taken.cpu_s:6.2f} {max(taken.cpu_s - alone.cpu_s, 0):14.2f}"
            f" {taken.wall_s:7.2f} {taken.peak_bytes / 2**20:9.0f} {taken.printed_bytes / 1024:11.0f}",
            flush=True,
        )


def _tiny(database: Database, folder: Path) -> str:
    """The URL of a database beside this one, with a dozen jobs."""
    url = database.engine.url
    if database.is_sqlite:
        (folder / _TINY).unlink(missing_ok=True)
        url = url.set(database=str(folder / _TINY))
    else:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{_TINY}"'))
            connection.execute(text(f'CREATE DATABASE "{_TINY}"'))
        url = url.set(database=_TINY)
    tiny = Database(url.render_as_string(hide_password=False))
    upgrade(tiny)
    fill(tiny, Sizes(jobs=12, large=2, queued=6))
    tiny.dispose()
    return url.render_as_string(hide_password=False)


def _commands(database: Database) -> Sequence[Sequence[str]]:
    large = large_batch(database)
    batch = format_batch_id(large)
    job = format_job_id(first_result(database, large))
    limit = ("--limit", "50")
    return (
        ("status",),
        ("status", *limit),
        ("status", batch),
        ("status", batch, *limit),
        ("jobs", "--state", "failed"),
        ("jobs", "--state", "failed", *limit),
        ("results", *limit),
        ("results", "--batch", batch, *limit),
        ("results", "--sort", "kl_mean", *limit),
        ("compare", *limit),
        ("compare", "--batch", batch, *limit),
        ("show", job),
        ("workers",),
    )


def _environ(url: str, folder: Path) -> dict[str, str]:
    return {"QBATCH_HOME": str(folder / "home"), "QBATCH_DATABASE_URL": url, "QBATCH_LEASE_S": str(LEASE_S)}


def _prepare(database: Database, sizes: Sizes) -> None:
    before = database.schema_version()
    began = time.perf_counter()
    upgrade(database)
    upgraded_s = time.perf_counter() - began
    print(f"\n{database.place}")
    if before is None:
        began = time.perf_counter()
        fill(database, sizes)
        print(f"filled with {sizes} in {time.perf_counter() - began:.0f} s")
    elif before != SCHEMA_HEAD:
        print(f"upgraded from schema {before} to {SCHEMA_HEAD} in {upgraded_s:.1f} s")


if __name__ == "__main__":
    main()

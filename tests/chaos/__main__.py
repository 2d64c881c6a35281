"""``python -m tests.chaos``: kill at random what works on batches, then give an exact account."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.account import Account
from tests.chaos.stack import ChaosPlan, ChaosStack, StackOutcome
from tests.chaos.tiny_sources import Sources


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where the account finds a problem or the kills were not reached, else 0."""
    options = parse(arguments)
    folder = Path(tempfile.mkdtemp(prefix="qbatch-chaos-"))
    _print(f"seed {options.seed}; {folder}")
    try:
        outcomes = run(options, folder)
    except BaseException:
        _print(f"everything is kept in {folder}")
        raise
    total = report(outcomes, options)
    if total.problems or options.keep:
        _print(f"everything is kept in {folder}")
    else:
        shutil.rmtree(folder)
    short = sum(outcome.kills for outcome in outcomes) < options.kills
    return 1 if total.problems or short else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="processes to kill, all stacks together")
    parser.add_argument("--jobs", type=int, default=48, help="jobs to submit at least, in each stack")
    parser.add_argument("--models", type=int, default=10**6, help="models to make at most, four at least")
    parser.add_argument("--workers", type=int, default=2, help="workers of each stack")
    parser.add_argument("--stacks", type=int, default=1, help="independent stacks at once")
    parser.add_argument("--shared-storage", action="store_true", help="all stacks publish to one storage")
    parser.add_argument("--changing-sources", action="store_true", help="rewrite weights while jobs read them")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--minutes", type=float, help="end the kills after this long")
    parser.add_argument("--gap", type=float, help="mean seconds between two faults of a stack")
    parser.add_argument("--lease", type=float, default=5.0, help="QBATCH_LEASE_S")
    parser.add_argument("--settle", type=float, default=600.0, help="seconds for the open jobs to end afterwards")
    parser.add_argument("--postgresql", action="store_true", help="a real PostgreSQL instead of SQLite")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, folder: Path) -> list[StackOutcome]:
    """Every stack at once, each in a folder of its own below ``folder``."""
    cores = len(os.sched_getaffinity(0))
    threads = max(cores // (options.workers * options.stacks), 1)
    minutes = options.minutes if options.minutes is not None else float("inf")
    shares = [len(range(stack, options.kills, options.stacks)) for stack in range(options.stacks)]
    together = threading.Barrier(options.stacks if options.shared_storage else 1)
    everyones = Sources(folder / "sources")
    with _databases(options) as urls, ThreadPoolExecutor(options.stacks) as pool:
        stacks = [
            ChaosStack(
                folder / f"stack{number}",
                ChaosPlan(
                    seed=f"{options.seed}:{number}",
                    kills=kills,
                    jobs=options.jobs,
                    models=options.models,
                    workers=options.workers,
                    lease_s=options.lease,
                    gap_s=options.gap if options.gap is not None else 3.0 / options.workers,
                    settle_s=options.settle,
                    deadline=time.monotonic() + 60 * minutes,
                    threads=threads,
                    database_url=url,
                    storage=folder / "storage" if options.shared_storage else None,
                    changes_sources=options.changing_sources,
                ),
                everyones if options.shared_storage else Sources(folder / f"stack{number}" / "sources"),
                together,
                _speaker(number),
            )
            for number, (kills, url) in enumerate(zip(shares, urls, strict=True))
        ]
        databases = [stack.database for stack in stacks] if options.shared_storage else []
        ends = [pool.submit(stack.run, databases) for stack in stacks]
        try:
            return [end.result() for end in ends]
        except BaseException:
            for stack in stacks:
                stack.halt()
            raise


@contextmanager
def _databases(options: argparse.Namespace) -> Iterator[list[str | None]]:
    """The database URL of each stack; None is the embedded one."""
    if not options.postgresql:
        yield [None] * options.stacks
        return
    from sqlalchemy import create_engine, make_url, text

    from tests.postgres import Postgres

    server = Postgres()
    try:
        engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
        urls = []
        with engine.connect() as connection:
            for number in range(options.stacks):
                connection.execute(text(f"CREATE DATABASE stack{number}"))
                urls.append(make_url(server.url).set(database=f"stack{number}").render_as_string(hide_password=False))
        engine.dispose()
        yield list(urls)
    finally:
        server.close()


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _speaker(stack: int) -> Callable[[str], None]:
    begun, lock = time.monotonic(), threading.Lock()

    def say(line: str) -> None:
        with lock:
            _print(f"{time.monotonic() - begun:7.1f}s [{stack}] {line}")

    return say


def report(outcomes: Sequence[StackOutcome], options: argparse.Namespace) -> Account:
    """Print the figures of all stacks together, and every problem."""
    total = sum((outcome.account for outcome in outcomes), Account())
    faults: Counter[str] = sum((outcome.faults for outcome in outcomes), Counter())
    kills = sum(outcome.kills for outcome in outcomes)
    wall_s = max(outcome.wall_s for outcome in outcomes)
    jobs, attempts = total.figures["jobs"], total.figures["attempts"]
    _print(f"\nseed {options.seed}: {kills} kills of {options.kills}, {faults.total() - kills} other faults")
    for name, count in faults.most_common():
        _print(f"  {count:5} {name}")
    _print(f"{jobs} jobs in {sum(outcome.batches for outcome in outcomes)} batches; QBATCH_MAX_FAILURES was 1000")
    for name, count in sorted(total.figures.items()):
        _print(f"  {count:5} {name}")
    ended = sum(outcome.ended_under_fire for outcome in outcomes)
    _print(f"{ended} jobs ended under fire; {attempts / max(jobs, 1):.2f} attempts a job; {wall_s:.0f} s")
    _print(f"{len(total.problems)} problems")
    for problem in total.problems:
        _print(f"  {problem}")
    return total


if __name__ == "__main__":
    sys.exit(main())

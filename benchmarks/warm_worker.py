"""Measures how long the bundles of a warm CPU worker take, from claim to end and from claim to published.

    python -m benchmarks.warm_worker                                     (one job, and three rows of a tiny model)
    python -m benchmarks.warm_worker --shape 300m --bits 8,4 --repeats 2

Each bundle has a model of its own, with random weights, so that nothing is answered by an earlier result. The first of
each kind only warms up. Times are those of the database, the kernel's for the folder that a checkpoint is published in.
"runner CPU" is what all processes that the forkserver started have used: on a busy machine it says more than the
seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import select

from benchmarks.polling import wait_until
from benchmarks.quantize import in_fresh_process
from benchmarks.random_source import SHAPES, build_source, build_tokenizer
from benchmarks.report import log, show
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Job, Result
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.local_stack import LocalStack
from qbatch.scheduler.submit import Submission, send_now, submit
from qbatch.worker.measuring import DEFAULT_EVAL_TEXT

_POLL_S = 0.05
_READY_FILE = "workers.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleTimes:
    """Of one bundle, in seconds. ``pass_s``: the pass that quantized; ``published_s``: from claim to the last width."""

    wall_s: float
    cpu_s: float
    pass_s: float | None
    published_s: float | None


class WarmStack:
    """A running stack with one worker on the CPU."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database = Database(settings.sqlalchemy_url)
        self._text = DEFAULT_EVAL_TEXT.read_text()

    def wait_for_worker(self) -> None:
        path = self._settings.home / "logs" / _READY_FILE
        wait_until(lambda: path.exists() and " ready." in path.read_text(), "worker", poll_s=_POLL_S)

    def run(self, source: Path, *, bits: Sequence[int], baseline: bool) -> BundleTimes:
        """Submit one model and wait for its end. Raises RuntimeError if a job does not succeed."""
        before_s = self._runners_cpu_s()
        submission = Submission(
            sources=(parse_source(str(source)),),
            grid=Grid(bits=tuple(bits), baseline=baseline),
            eval_text=self._text,
        )
        batch_id = submit(self._database, self._settings, submission).batch_id
        send_now(self._database, self._settings)
        wait_until(lambda: self._has_ended(batch_id), f"end of {source.name}", poll_s=_POLL_S)
        # A runner that has reported everything still has to exit and to be waited for.
        time.sleep(2 * _POLL_S + 0.2)
        return self._figures(batch_id, self._runners_cpu_s() - before_s)

    def close(self) -> None:
        self._database.dispose()

    def _has_ended(self, batch_id: int) -> bool:
        with self._database.read() as session:
            return not session.scalars(
                select(Job.id).where(Job.batch_id == batch_id, Job.finished_at.is_(None)).limit(1)
            ).first()

    def _figures(self, batch_id: int, cpu_s: float) -> BundleTimes:
        with self._database.read() as session:
            jobs = session.scalars(select(Job).where(Job.batch_id == batch_id)).all()
            for job in jobs:
                if job.state != "succeeded":
                    raise RuntimeError(f"j{job.id}: {job.state}, {job.error_message}")
            ids = [job.id for job in jobs]
            claimed = min(session.scalars(select(Attempt.claimed_at).where(Attempt.job_id.in_(ids))))
            results = session.scalars(select(Result).where(Result.job_id.in_(ids))).all()
            ended = max(job.finished_at for job in jobs if job.finished_at is not None)
            paths = [one.checkpoint_path for one in results if one.checkpoint_path is not None]
            passes = [one.quantize_s for one in results if one.quantize_s is not None]
        # When a folder was last renamed into the model's, which each bundle has of its own. The checkpoint's own times
        # are those of its card, which is written after the measurement.
        published = [(self._settings.storage / path).parent.stat().st_mtime for path in paths]
        return BundleTimes(
            wall_s=(ended - claimed).total_seconds(),
            cpu_s=cpu_s,
            pass_s=max(passes, default=None),
            published_s=max(published) - claimed.timestamp() if published else None,
        )

    def _runners_cpu_s(self) -> float:
        """CPU seconds of the runners that have ended, and of what they had started."""
        family = psutil.Process().children(recursive=True)
        forkservers = [one for one in family if "multiprocessing.forkserver" in " ".join(one.cmdline())]
        # A runner looks like its forkserver, and has no children.
        times = [one.cpu_times() for one in forkservers]
        return sum(one.children_user + one.children_system for one in times)


@contextmanager
def running_stack(home: Path) -> Iterator[WarmStack]:
    environ = os.environ | {"QBATCH_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    settings = Settings.from_env(environ)
    with LocalStack(settings, worker_args=["--cpu"], environ=environ):
        stack = WarmStack(settings)
        try:
            stack.wait_for_worker()
            yield stack
        finally:
            stack.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--bits", default=None, help="these widths only, without a baseline")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the folder, whose logs tell the stages")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary directory)")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    work = Path(tempfile.mkdtemp(prefix="qbatch-bench-", dir=arguments.folder))
    try:
        _measure(arguments, work)
    finally:
        if arguments.keep:
            log(f"kept {work}")
        else:
            shutil.rmtree(work)
    return 0


def _measure(arguments: argparse.Namespace, work: Path) -> None:
    kinds: list[tuple[str, list[int], bool]] = [("one job", [4], False), ("three rows", [8, 4], True)]
    if arguments.bits is not None:
        kinds = [(f"{arguments.bits} bits", [int(one) for one in arguments.bits.split(",")], False)]
    count = len(kinds) * (arguments.repeats + 1)
    sources = [work / f"model-{number}" for number in range(count)]
    for number, source in enumerate(sources):
        in_fresh_process(build_source, arguments.shape, source, number)
        build_tokenizer(source)
    remaining = iter(sources)
    print(f"{'':16}{'wall s':>10}{'runner CPU s':>14}{'pass s':>10}{'claim to published s':>22}")
    with running_stack(work / "home") as stack:
        for name, bits, baseline in kinds:
            stack.run(next(remaining), bits=bits, baseline=baseline)
            for _ in range(arguments.repeats):
                figures = stack.run(next(remaining), bits=bits, baseline=baseline)
                print(
                    f"{name:16}{figures.wall_s:10.2f}{figures.cpu_s:14.2f}"
                    f"{show(figures.pass_s, '.2f'):>10}{show(figures.published_s, '.2f'):>22}"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())

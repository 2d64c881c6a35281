"""``plan`` and ``submit --dry-run``: what a batch would write, need and take, with nothing stored."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Done
from sqlalchemy import select, update

from qbatch.cli import main
from qbatch.core.domain import DeviceKind, DType, ProtocolOptions, SourceRef
from qbatch.core.search.bound import Bound
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source, weight_files
from qbatch.models_db import jobs, searches
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Batch, Job, Result
from qbatch.scheduler.batch_plan import BatchPlan, Earlier, plan_batch
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, submit
from qbatch.views.plan_table import plan_rows, render_plan, short_of_disk, show_duration
from qbatch.views.units import show_bytes
from qbatch.worker.quantizing import Target, write_checkpoints
from tests import tiny
from tests.found import a_search, searching
from tests.integration.test_submit import TEXT, hashed, measure, settled
from tests.rows import a_batch, a_gpu, claim
from tests.source_identity import fingerprint

GRID = Grid(bits=(4, 8), device=DeviceKind.CPU)
PROMPT_TOKENS = ProtocolOptions(eval_text_sha256="").for_device(DeviceKind.CPU).prompt_tokens


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make_causal(tmp_path / "model", dtype="bfloat16")


def asked(*sources: SourceRef, grid: Grid = GRID) -> Submission:
    return Submission(sources=sources, grid=grid, eval_text="words")


def _words(plan: BatchPlan) -> str:
    """What is printed, on one line."""
    return " ".join(render_plan(plan).split())


def stored_batches(database: Database) -> int:
    with database.read() as session:
        return len(session.scalars(select(Batch)).all())


def test_the_bytes_are_those_that_are_written(
    sqlite_database: Database, settings: Settings, model: Path, tmp_path: Path
) -> None:
    plan = plan_batch(sqlite_database, settings, asked(parse_source(str(model))))
    baseline, *others = plan.jobs
    assert (baseline.output, baseline.dtype) == (None, DType.BFLOAT16)
    targets = [
        Target(scheme=job.spec.scheme.resolved(DType.BFLOAT16), folder=tmp_path / str(n))
        for n, job in enumerate(others)
    ]
    for target in targets:
        target.folder.mkdir()
    list(write_checkpoints(model, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None))
    written = [sum(path.stat().st_size for path in weight_files(target.folder)) for target in targets]
    assert [row["output_bytes"] for row in plan_rows(plan)] == [0, *written]
    assert sum(size.nbytes for size in plan.to_write) == sum(written)
    assert stored_batches(sqlite_database) == 0


def test_a_checkpoint_that_several_inputs_share_is_counted_once(
    sqlite_database: Database, settings: Settings, model: Path
) -> None:
    once = plan_batch(sqlite_database, settings, asked(parse_source(str(model))))
    grid = Grid(bits=(4, 8), device=DeviceKind.CPU, prompt_tokens=(8, 16))
    plan = plan_batch(sqlite_database, settings, asked(parse_source(str(model)), grid=grid))
    assert len(plan.jobs) == 2 * len(once.jobs)
    assert plan.to_write == once.to_write


def test_what_is_answered_and_how_long_the_others_take_is_known(
    database: Database, settings: Settings, model: Path, tmp_path: Path
) -> None:
    source = hashed(database, model)
    ids = measure(database, model, source)
    with database.write() as session:
        session.execute(update(Result).values(num_parameters=500_000))
        for attempt in session.scalars(select(Attempt)):
            attempt.ended_at = attempt.claimed_at + timedelta(seconds=60)
    other = tiny.make_causal(tmp_path / "other", dtype="bfloat16", seed=1)
    hub = SourceRef(name="org/m", location="org/m")
    submission = Submission(sources=(source, parse_source(str(other)), hub), grid=GRID, eval_text=TEXT)
    plan = plan_batch(database, settings, submission)
    assert [job.answered_by for job in plan.jobs] == [*(f"j{number}" for number in ids), *[None] * 6]
    assert [job.earlier for job in plan.jobs] == [Earlier.ANSWERED] * 3 + [Earlier.UNKNOWN] * 6
    durations = [job.duration for job in plan.jobs[3:]]
    assert [duration and round(duration.seconds) for duration in durations] == [20, 20, 20, None, None, None]
    assert (round(plan.seconds), plan.jobs_without_estimate, plan.live_workers) == (60, 3, 1)
    assert plan.has_unknown_sizes
    shown = render_plan(plan)
    for line in (
        "3 models, 9 jobs, 3 of them answered by earlier results",
        "whether earlier results answer 6 of them is known once a worker has the files",
        "and those of models whose headers are not here",
        "time: about 60 s of one worker, as earlier jobs took; 3 jobs like none before are not counted",
        f"the result of j{ids[0]}",
    ):
        assert line in " ".join(shown.split()), shown
    assert shown.count(str(model)) == 1, "in the first of its three lines"


def test_the_gpu_that_is_needed_is_named(sqlite_database: Database, settings: Settings, model: Path) -> None:
    plan = plan_batch(sqlite_database, settings, asked(parse_source(str(model)), grid=Grid(bits=(4,))))
    assert [job.vram_class_gib for job in plan.jobs] == [4, 4]
    assert all(job.memory_bytes is not None for job in plan.jobs)
    on_cpu = plan_batch(sqlite_database, settings, asked(parse_source(str(model))), here=DeviceKind.CPU)
    assert "GPU" not in render_plan(on_cpu)
    a_gpu(sqlite_database, 24)
    submission = asked(parse_source(str(model)), grid=Grid(bits=(4,)))
    plan = plan_batch(sqlite_database, settings, submission, here=DeviceKind.CPU)  # a live one counts for more
    assert plan.warnings == {}
    assert "(4 GiB GPU)" in render_plan(plan)


def test_too_little_room_is_said(sqlite_database: Database, settings: Settings, model: Path) -> None:
    plan = plan_batch(sqlite_database, settings, asked(parse_source(str(model))))
    assert plan.free_bytes is not None
    assert short_of_disk(plan) is None
    little = BatchPlan(jobs=plan.jobs, storage=plan.storage, free_bytes=1000, live_workers=0, warnings={})
    assert "too few: jobs wait until there is room" in str(short_of_disk(little))


def test_the_plan_is_what_submit_then_stores(database: Database, settings: Settings, model: Path) -> None:
    submission = asked(parse_source(str(model)), SourceRef(name="org/m", location="org/m"))
    plan = plan_batch(database, settings, submission)
    receipt = submit(database, settings, submission)
    assert (len(plan.jobs), sum(job.earlier is Earlier.UNKNOWN for job in plan.jobs)) == (
        receipt.jobs,
        receipt.undecided,
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (400_000, "4.6 days")]
)
def test_a_duration_is_shown_in_its_own_unit(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


# The commands


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QBATCH_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def qbatch(*arguments: str) -> Done:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_plan_and_a_dry_run_print_the_same_and_store_nothing(home: Path, model: Path) -> None:
    arguments = (str(model), "org/m", "--bits", "4,8")
    planned, dry = qbatch("plan", *arguments), qbatch("submit", *arguments, "--dry-run")
    assert (planned.exit_code, dry.exit_code) == (0, 0)
    # Others write to the disk meanwhile.
    printed = [re.sub(r"\S+ GiB are free", "some are free", done.stdout) for done in (planned, dry)]
    assert printed[0] == printed[1]
    assert "2 models, 6 jobs" in planned.stdout
    assert "time: not known, since no job that measures the same has ended yet" in planned.stdout
    assert json.loads(qbatch("status", "--json").stdout) == []
    assert qbatch("submit", *arguments, "--dry-run", "--wait").exit_code == 2


def test_bad_lines_are_named_below_the_plan_of_the_others(home: Path, model: Path) -> None:
    bad = tiny.make_causal(home / "bad", dtype="bfloat16")
    (bad / "model.safetensors").write_bytes(b"x" * 100)
    (home / "list").write_text(f"{model}\n./bad\n./none\n")
    arguments = ("plan", "--models", "list", "--bits", "4", "--json")
    done = qbatch(*arguments)
    value: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == 2
    assert [job["scheme"] for job in value["jobs"]] == ["none", "bnb-nf4"]
    assert [text.split(":")[0] for text in value["problems"]] == ["line 2", "line 3"]
    assert "line 2: ./bad: model.safetensors is not a safetensors file" in done.stderr
    assert qbatch(*arguments, "--keep-going").exit_code == 0
    both = qbatch("plan", "./bad", "./none", str(model), "--bits", "4")
    assert "2 of 3 models cannot be used, so submit would refuse this list:" in both.stderr
    alone = qbatch("plan", "./bad", "--bits", "4")
    assert (alone.exit_code, alone.stdout) == (2, "")


def test_a_search_takes_as_long_as_earlier_ones_until_it_is_stored(
    sqlite_database: Database, settings: Settings, model: Path
) -> None:
    source = hashed(sqlite_database, model)
    grid = Grid(bits=(4,), device=DeviceKind.CPU, bound=Bound(max_weights_bytes=600_000))
    submission = Submission(sources=(source,), grid=grid, eval_text=TEXT, search_text="other words")
    measure(sqlite_database, model, source)
    with sqlite_database.write() as session:
        session.execute(update(Result).values(num_parameters=500_000))
        for attempt in session.scalars(select(Attempt)):
            attempt.ended_at = attempt.claimed_at + timedelta(seconds=60)
    before = plan_batch(sqlite_database, settings, submission)
    unknown = before.jobs[-1]
    assert (unknown.earlier, unknown.duration) == (Earlier.NOTHING, None)
    assert unknown.output is not None
    assert "how long a search takes here is known once one that measures the same has ended, or a baseline's" in _words(
        before
    )
    with sqlite_database.write() as session:
        session.execute(update(Result).values(prefill_s_p50=PROMPT_TOKENS * 1e-3))
    first = plan_batch(sqlite_database, settings, submission)
    assert first.jobs[-1].duration is not None
    # 8 groups: 17.5 passes over 16 windows of 256 tokens, a millisecond each, and the job that publishes.
    assert round(first.jobs[-1].duration.seconds) == round(17.5 * 16 * 256 * 1e-3) + 20
    assert "its passes are counted, and taken for as fast as prefills were" in _words(first)
    _, (search,) = a_batch(sqlite_database, searching(Bound(max_kl=0.1)))
    (token,) = claim(sqlite_database, [search], 1)
    with sqlite_database.write() as session:
        jobs.searched(session, token, "another key", replace(a_search(), parameters=500_000))
    planned = plan_batch(sqlite_database, settings, submission).jobs[-1]
    assert planned.duration is not None
    assert round(planned.duration.seconds) == 12 + 20, "and a job that publishes what it finds"
    (spec,) = [
        job.spec for job in plan_batch(sqlite_database, settings, submission).jobs if job.spec.search is not None
    ]
    with sqlite_database.write() as session:
        searches.add(session, settled(spec, fingerprint(model)).key, search, a_search(), again=False)
    there = plan_batch(sqlite_database, settings, submission)
    assert there.jobs[-1].earlier is Earlier.SEARCH
    assert there.jobs[-1].duration is not None
    assert round(there.jobs[-1].duration.seconds) == 20
    assert "what a search found" in render_plan(there)
    # A submit goes on from there: nobody searches, and the job of the first point stands beside the search.
    receipt = submit(sqlite_database, settings, submission)
    with sqlite_database.read() as session:
        stored = session.scalars(select(Job).where(Job.batch_id == receipt.batch_id).order_by(Job.id)).all()
        asked_for, point = stored[-2:]
        assert (asked_for.state, asked_for.search_id is not None) == ("queued", True)
        assert (point.search_job_id, point.point, point.bundle) == (asked_for.id, 4, stored[0].bundle)
    assert f"bnb-nf4 auto, weights ≤ {show_bytes(600_000)}" in render_plan(there)

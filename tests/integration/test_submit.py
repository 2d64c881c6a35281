"""A submit stores its batch chunk by chunk: nobody sees a part of it, nobody waits for it, and what is killed leaves
nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from qbatch.core.digest import Checksums, digest_file
from qbatch.core.domain import Claim, DeviceKind, DType, JobSpec, JobState, SourceRef
from qbatch.core.errors import BrokerUnreachable, DatabaseUnreachable
from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.identity import Settled, settle
from qbatch.core.model_files import content_files
from qbatch.core.settings import Settings
from qbatch.core.sources import parse_source
from qbatch.models_db import arrivals, file_digests, jobs, results, skip_list_keys, window
from qbatch.models_db.arrivals import Arriving
from qbatch.models_db.batches import NewJob, batch_exists, job_exists
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.health import health
from qbatch.models_db.job_record import whole_jobs
from qbatch.models_db.listing import count_states, list_batches, list_jobs
from qbatch.models_db.retention import delete_jobs, find_prunable
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Arrival, Job
from qbatch.scheduler import submission_lookup
from qbatch.scheduler import submit as submit_module
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.loop import Scheduler
from qbatch.scheduler.submission_lookup import SubmissionLookup
from qbatch.scheduler.submit import Submission, submit
from qbatch.worker.runner.messages import JobIdentity, Resolved
from qbatch.worker.serving.answers import Answers
from tests.rows import a_batch, a_job, a_worker, claim, measured
from tests.source_identity import fingerprint
from tests.tiny import make_causal

TEXT = "an evaluation text"
MODELS = 8
GRID = Grid(bits=(4, 8), device=DeviceKind.CPU)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # Nothing listens there: what is left of a submit is removed all the same.
    return Settings(
        home=tmp_path, storage=tmp_path, cache=tmp_path, broker_url="redis://127.0.0.1:1/0",
        lease_s=0.5, heartbeat_s=0.1, scan_s=0.1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models each."""
    monkeypatch.setattr(submit_module, "_JOBS_AT_ONCE", 6)


@pytest.fixture
def other(database: Database) -> Iterator[Database]:
    """The same database as another process sees it."""
    seen_by_others = Database(url_of(database))
    yield seen_by_others
    seen_by_others.dispose()


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def submission(*sources: SourceRef) -> Submission:
    hub = tuple(SourceRef(name=f"org/m{n}", location=f"org/m{n}") for n in range(MODELS))
    return Submission(sources=sources or hub, grid=GRID, eval_text=TEXT)


def seen(database: Database) -> dict[str, Any]:
    """What every command and service sees of the jobs."""
    with database.read() as session:
        ids = [job["job_id"] for job in list_jobs(session)]
        found = {
            "batches": [{**batch, "created_at": None, "elapsed_s": None} for batch in list_batches(session)],
            "jobs": list_jobs(session),
            "states": count_states(session, range(1, 9)),
            "results": results.find_results(session, sort="-job_id"),
            "open": health(session, 60.0).open_jobs,
            "whole": whole_jobs(session, range(1, 99)),
            "prunable": find_prunable(session, -60.0),
            "batch exists": [batch_exists(session, number) for number in range(1, 9)],
            "job exists": [job_exists(session, number) for number in range(1, 99)],
        }
    with database.write() as session:
        found["dispatched"] = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=0)
        found["cancelled"] = jobs.cancel(session, batch_ids=range(2, 9), job_ids=range(len(ids) + 1, 99))
        found["retried"] = jobs.retry(session, batch_ids=range(2, 9), job_ids=range(len(ids) + 1, 99))
        found["claimed"] = [one.job_id for one in jobs.claim(session, range(len(ids) + 1, 99), WORKER, 60.0)]
    return found


WORKER = 1


def dispatchable(database: Database) -> list[str]:
    with database.write() as session:
        chosen = window.choose(session, kind=DeviceKind.CPU, queue="cpu", slots=99)
        session.rollback()
    return [dispatch.label for dispatch in chosen]


def stored(database: Database) -> dict[str, int]:
    """How many rows there are, whoever may see them."""
    with database.engine.connect() as connection:
        tables = ("batches", "jobs", "arrivals")
        return {
            name: connection.execute(text(f"SELECT count(*) FROM {name}")).scalar_one()  # noqa: S608
            for name in tables
        }


def test_nobody_sees_a_batch_before_it_is_whole(database: Database, other: Database, settings: Settings) -> None:
    a_worker(database)
    a_batch(database)
    before, first = seen(other), dispatchable(other)
    views: list[tuple[dict[str, Any], list[str]]] = []
    receipt = submit(database, settings, submission(), lambda _: views.append((seen(other), dispatchable(other))))
    assert len(views) == MODELS / 2
    assert all(view == (before, first) for view in views)
    assert (receipt.jobs, receipt.answered) == (3 * MODELS, 0)
    with other.read() as session:
        assert list_batches(session)[-1]["queued"] == 3 * MODELS
        models = [job["model"] for job in list_jobs(session, batch_ids=[receipt.batch_id])]
    assert models == [f"org/m{n}" for n in range(MODELS) for _ in range(3)], "in the order of the list"
    assert len(dispatchable(other)) == len(first) + MODELS
    assert stored(database) == {"batches": 2, "jobs": 3 * MODELS + 3, "arrivals": 0}


def test_a_transaction_that_began_before_sees_nothing_of_it(database: Database, settings: Settings) -> None:
    with database.read() as session:
        assert list_jobs(session) == []
        submit(database, settings, submission())
        assert list_jobs(session) == [] or not database.is_sqlite
    with database.read() as session:
        assert len(list_jobs(session)) == 3 * MODELS


# Kills


def dies_after(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which kills its process at the end of its call of that number."""
    calls = itertools.count(1)

    def counted(*arguments: object, **named: object) -> Any:
        returned = function(*arguments, **named)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return returned

    return counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a submit is killed: at the end of that call of a function of a module or class."""

    owner: Any
    name: str
    call: int

    def arm(self) -> None:
        setattr(self.owner, self.name, dies_after(self.call, getattr(self.owner, self.name)))


POINTS = {
    "before the first chunk": Point(owner=submit_module, name="inspect_unchecked", call=1),
    "within the first chunk": Point(owner=arrivals, name="add_jobs", call=1),
    "within the third chunk": Point(owner=arrivals, name="add_jobs", call=3),
    "between two chunks": Point(owner=SubmissionLookup, name="look_up", call=4),
    "while it becomes visible": Point(owner=SubmissionLookup, name="look_again", call=1),
}


def run_killed(database: Database, settings: Settings, point: Point) -> None:
    """A submit in a process of its own, until it is killed there."""

    def run() -> None:
        point.arm()
        submit(Database(url_of(database)), settings, submission())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS.keys())
def test_a_killed_submit_leaves_nothing(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, point: Point
) -> None:
    a_worker(database)
    a_batch(database)
    before = seen(database)
    run_killed(database, settings, point)
    assert seen(database) == before
    if database.is_sqlite:
        assert stored(database)["arrivals"] == 1
    # A second one is not disturbed by what is left of the first, and is not taken for it.
    again = submit(database, settings, submission())
    assert again.jobs == 3 * MODELS
    whole = {"batches": 2, "jobs": 3 + 3 * MODELS, "arrivals": 0}
    monkeypatch.setattr(arrivals, "_REMOVED_AT_ONCE", 4)
    scheduler = Scheduler(database, Broker(settings), settings)
    deadline = time.monotonic() + 20
    while stored(database) != whole:
        assert time.monotonic() < deadline, "what was left was not removed"
        with contextlib.suppress(BrokerUnreachable):
            scheduler.tick()
        time.sleep(0.02)
    with database.read() as session:
        assert list_batches(session)[-1]["queued"] == 3 * MODELS


def silence(database: Database, seconds: float) -> None:
    with database.write() as session:
        session.execute(update(Arrival).values(seen_at=db_now(-seconds)))


def test_a_submit_that_slept_while_it_was_removed_ends(sqlite_database: Database, settings: Settings) -> None:
    def sleep(_: int) -> None:
        silence(sqlite_database, 2.0)
        arrivals.remove_silent(sqlite_database, 1.0)

    with pytest.raises(DatabaseUnreachable, match="silent for longer than QBATCH_LEASE_S"):
        submit(sqlite_database, settings, submission(), sleep)
    assert stored(sqlite_database) == {"batches": 0, "jobs": 0, "arrivals": 0}


def test_a_submit_that_is_heard_of_is_not_removed(sqlite_database: Database, settings: Settings) -> None:
    removed: list[int] = []
    submit(
        sqlite_database, settings, submission(), lambda _: removed.extend(arrivals.remove_silent(sqlite_database, 60.0))
    )
    assert removed == []
    assert stored(sqlite_database)["jobs"] == 3 * MODELS


def test_a_submit_is_heard_of_while_a_slow_storage_is_asked_for_answers(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint takes less than a lease, those of a chunk take more."""
    look = SubmissionLookup.answers
    removed: list[int] = []

    def slow(lookup: SubmissionLookup, finished: Any, after_each: Callable[[], None] | None = None) -> Any:
        if after_each is None:
            return look(lookup, finished)
        for _ in range(4):
            silence(sqlite_database, 2000.0)
            time.sleep(settings.heartbeat_s)
            after_each()
            removed.extend(arrivals.remove_silent(sqlite_database, 1000.0))
        return look(lookup, finished, after_each)

    monkeypatch.setattr(SubmissionLookup, "answers", slow)
    submit(sqlite_database, settings, submission())
    assert removed == []
    assert stored(sqlite_database)["jobs"] == 3 * MODELS


def test_a_silent_submit_from_before_the_clock_was_set_back_goes(sqlite_database: Database, settings: Settings) -> None:
    run_killed(sqlite_database, settings, POINTS["between two chunks"])
    silence(sqlite_database, -3000.0)
    assert arrivals.remove_silent(sqlite_database, 0.1) == []
    with sqlite_database.write() as session:
        assert arrivals.shorten_future_times(session) == 1
    time.sleep(0.2)
    assert len(arrivals.remove_silent(sqlite_database, 0.1)) == 1


# Answers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_causal(tmp_path / "model", dtype="bfloat16")


def hashed(database: Database, folder: Path) -> SourceRef:
    """A folder whose files a worker of this host has hashed."""
    mounts = Mounts()
    digests = {
        stat_file(path, mounts): Checksums(chunk_sha256=digest_file(path).chunk_sha256, sha256=None)
        for path in content_files(folder).values()
    }
    with database.write() as session:
        file_digests.remember(session, digests)
    return parse_source(str(folder))


def measure(database: Database, folder: Path, source: SourceRef) -> list[int]:
    """Another batch's jobs of the same model succeed; their ids."""
    worker = a_worker(database)
    known = fingerprint(folder)
    asked = [(spec, settled(spec, known)) for spec in submission(source).specs()]
    new = [NewJob(spec=spec, bits=spec.scheme.bits(DType.BFLOAT16), checkpoint_key=one.key) for spec, one in asked]
    _, ids = a_batch(database, new)
    protocols = {job_id: one.protocol for job_id, (_, one) in zip(ids, asked, strict=True)}
    for token in claim(database, ids, worker):
        with database.write() as session:
            assert jobs.succeed(session, token, measured(), protocol=protocols[token[0]], checkpoint_path=None)
    return ids


def settled(spec: JobSpec, known: str) -> Settled:
    return settle(spec, fingerprint=known, source=DType.BFLOAT16, device_kind=DeviceKind.CPU)


def with_a_folder(database: Database, folder: Path) -> Submission:
    """A folder, and then as many hub models as fill several chunks."""
    return submission(hashed(database, folder), *submission().sources)


def answers(database: Database, batch_id: int) -> list[int]:
    with database.read() as session:
        ids = session.scalars(select(Job.id).where(Job.batch_id == batch_id).order_by(Job.id)).all()
    found = [a_job(database, job_id) for job_id in ids]
    assert all((job.state == JobState.SUCCEEDED) == (job.reused_from is not None) for job in found)
    assert all((job.finished_at is None) == (job.reused_from is None) for job in found)
    return [job.reused_from for job in found if job.reused_from is not None]


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, []),
        ({"skip_modules": ("down_proj",)}, []),
        ({"skip_modules": ("q_proj",)}, ["cannot load 2 layers", "which fails", "without a message", "which fails"]),
        (
            {"options": {"quant_storage": "bfloat16"}},
            ["only if they are stored as uint8", "only if they are stored as uint8"],
        ),
        ({"arch": "mixtral"}, ["cannot load int8 checkpoints of mixtures", "quantizes the experts"]),
        ({"arch": "gpt2"}, []),
    ],
)
def test_what_engines_would_do_otherwise_is_warned_of(
    sqlite_database: Database, settings: Settings, tmp_path: Path, options: dict[str, Any], warned: list[str]
) -> None:
    arch = options.get("arch", "llama")
    model = make_causal(tmp_path / "model", arch, dtype="bfloat16")
    grid = Grid(bits=(4, 8), device=DeviceKind.CPU, **{key: one for key, one in options.items() if key != "arch"})
    sources = (parse_source(str(model)), *submission().sources)
    receipt = submit(sqlite_database, settings, Submission(sources=sources, grid=grid, eval_text="text"))
    assert list(receipt.warnings.values()) == [1] * len(warned)
    assert all(text in line for text, line in zip(warned, receipt.warnings, strict=True)), receipt.warnings


def test_what_is_measured_meanwhile_answers(
    database: Database, other: Database, settings: Settings, model: Path
) -> None:
    asked = with_a_folder(database, model)
    measured_ids: list[int] = []

    def measure_once(_: int) -> None:
        if not measured_ids:
            measured_ids.extend(measure(other, model, asked.sources[0]))

    receipt = submit(database, settings, asked, measure_once)
    assert (receipt.jobs, receipt.answered) == (3 * (MODELS + 1), 3)
    assert answers(database, receipt.batch_id) == measured_ids


def test_nobody_waits_for_the_storage_while_a_batch_becomes_visible(
    database: Database, other: Database, settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_a_folder(database, model)
    measured_ids: list[int] = []
    publish = Arriving.publish

    def measure_once(_: int) -> None:
        if not measured_ids:
            measured_ids.extend(measure(other, model, asked.sources[0]))

    def refuse(*_: object) -> bool:
        raise AssertionError("the storage was asked within the transaction")

    def watched(batch: Arriving, look_again: Callable[[Session, int], int]) -> int:
        with monkeypatch.context() as within:
            within.setattr(Path, "is_dir", refuse)
            within.setattr(submission_lookup, "checkpoint_state", refuse)
            return publish(batch, look_again)

    monkeypatch.setattr(Arriving, "publish", watched)
    receipt = submit(database, settings, asked, measure_once)
    assert answers(database, receipt.batch_id) == measured_ids


def test_what_was_measured_just_before_and_has_changed_answers_nobody(
    database: Database, settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is looked up nor when the batch becomes visible, where nobody looks at its files again."""
    asked = with_a_folder(database, model)
    measure(database, model, asked.sources[0])
    settings.storage.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(SubmissionLookup, "_is_sound", lambda *_: False)
    assert submit(database, settings, asked).answered == 0


def test_what_was_measured_before_answers(database: Database, settings: Settings, model: Path) -> None:
    asked = with_a_folder(database, model)
    measured_ids = measure(database, model, asked.sources[0])
    receipt = submit(database, settings, asked)
    assert (receipt.answered, receipt.undecided) == (3, 3 * MODELS)
    assert answers(database, receipt.batch_id) == measured_ids
    forced = submit(database, settings, replace(asked, grid=replace(GRID, force=True)))
    assert forced.answered == 0


def test_a_skip_list_is_answered_once_a_worker_has_settled_it(
    database: Database, settings: Settings, model: Path
) -> None:
    source = hashed(database, model)
    grid = Grid(bits=(4,), device=DeviceKind.CPU, baseline=False, skip_modules=("down_proj",))
    asked = Submission(sources=(source,), grid=grid, eval_text="text")
    (spec,) = asked.specs()
    as_spelt, key = settled(spec, fingerprint(model)), "k" * 64
    _, ids = a_batch(database, [NewJob(spec=spec, bits=4, checkpoint_key=key)])
    for token in claim(database, ids, a_worker(database)):
        with database.write() as session:
            assert jobs.succeed(session, token, measured(), protocol=as_spelt.protocol, checkpoint_path=None)
    before = submit(database, settings, asked)
    assert before.answered == 0
    with database.read() as session:
        assert session.scalars(select(Job.checkpoint_key).where(Job.batch_id == before.batch_id)).all() == [None]
    worker = a_worker(database, "settles it")
    with database.read() as session:
        waiting = session.scalars(select(Job.id).where(Job.batch_id == before.batch_id)).all()
    ((job_id, attempt),) = claim(database, waiting, worker)
    resolved = JobIdentity(
        key=key, legacy_key=None, protocol_hash=as_spelt.protocol.hash, spelled_keys={as_spelt.key: key}
    )
    claims = {job_id: Claim(job_id=job_id, attempt=attempt, spec=spec)}
    Answers(database, settings.storage, "this CPU", claims).find(Resolved(jobs={job_id: resolved}))
    receipt = submit(database, settings, asked)
    assert receipt.answered == 1
    assert answers(database, receipt.batch_id) == ids
    with database.write() as session:
        skip_list_keys.forget(session, -60.0)
    assert submit(database, settings, asked).answered == 0


def test_what_answers_a_batch_that_is_being_stored_is_not_pruned(
    database: Database, other: Database, settings: Settings, model: Path
) -> None:
    asked = with_a_folder(database, model)
    measured_ids = measure(database, model, asked.sources[0])

    def prune(_: int) -> None:
        with other.write() as session:
            found = find_prunable(session, -60.0).job_ids
            assert delete_jobs(session, found, -60.0) == 0, "SQLite sees the reference, PostgreSQL the lock"

    # The first chunk is stored when the second was looked up.
    calls: list[int] = []
    receipt = submit(database, settings, asked, lambda n: (calls.append(n), prune(n) if len(calls) > 1 else None))
    assert answers(database, receipt.batch_id) == measured_ids


def test_what_answered_and_was_pruned_meanwhile_is_measured_again(
    database: Database, other: Database, settings: Settings, model: Path
) -> None:
    asked = with_a_folder(database, model)
    measured_ids = measure(database, model, asked.sources[0])
    pruned: list[int] = []

    def prune_once(_: int) -> None:
        if not pruned:
            with other.write() as session:
                pruned.append(delete_jobs(session, measured_ids, -60.0))

    receipt = submit(database, settings, asked, prune_once)
    assert (pruned, receipt.answered) == ([3], 0)
    assert answers(database, receipt.batch_id) == []


# The command


def shown_by(home: Path, models: int, *arguments: str, on_terminal: bool) -> str:
    """What ``qbatch submit`` writes to standard error."""
    listed = home / "models.txt"
    listed.write_text("".join(f"org/m{n}\n" for n in range(models)))
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    environ = {**os.environ, "QBATCH_HOME": str(home / "home"), "TERM": "xterm"}
    command = [sys.executable, "-m", "qbatch", "submit", "--models", str(listed), "--bits", "4", *arguments]
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # EIO: the terminal was closed
        while more := os.read(ours, 4096):
            text += more
    os.close(ours)
    return text.decode()


def test_a_long_list_shows_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    assert "storing" in (shown := shown_by(tmp_path, 600, on_terminal=True))
    assert "600/600" in shown
    assert "storing" not in shown_by(tmp_path, 600, on_terminal=False)
    assert "storing" not in shown_by(tmp_path, 600, "--format", "quiet", on_terminal=True)

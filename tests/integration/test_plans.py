"""How the databases run what is asked often: by indexes, however long the history is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, text, update
from sqlalchemy.orm import Session

from benchmarks.database.history import Sizes, fill
from qbatch.core.byte_units import GIB
from qbatch.core.domain import DeviceKind, JobState, Method
from qbatch.core.errors import CudaOom, DeviceError
from qbatch.core.search.bound import Bound
from qbatch.core.search.search_request import SearchRequest
from qbatch.core.settings import Settings
from qbatch.models_db import (
    checkpoint_needs,
    checkpoints,
    finished_results,
    jobs,
    listing,
    results,
    searches,
    window,
    workers,
)
from qbatch.models_db.arrivals import Arriving
from qbatch.models_db.batches import JobRows, NewJob, add_empty_batch, jobs_with_checkpoints
from qbatch.models_db.bundle_mates import running_workers
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.health import health
from qbatch.models_db.job_pages import count_jobs
from qbatch.models_db.job_record import whole_jobs
from qbatch.models_db.lacking_devices import lacking_devices
from qbatch.models_db.measured_checkpoints import measured_checkpoints
from qbatch.models_db.mixture_origins import awaited_jobs
from qbatch.models_db.model_pages import results_of_first_models
from qbatch.models_db.next_bundle import find_next_bundle, is_worth_fetching
from qbatch.models_db.past_runs import past_runs
from qbatch.models_db.query_statistics import refresh_statistics
from qbatch.models_db.ready_bundles import QueueRange
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import VALUES_AT_ONCE, Database
from qbatch.models_db.speed_lookup import find_known_speeds
from qbatch.models_db.tables import Arrival, Job, Result
from qbatch.models_db.time_left import time_left
from qbatch.models_db.watching import Watcher
from qbatch.scheduler.submission_lookup import SubmissionLookup
from qbatch.worker.housekeeping.removed_targets import carry_out, plan_removal
from tests.found import KEY, SEARCH_PROTOCOL, a_search, measured_with
from tests.rows import POLICY, PROTOCOL, measured, spec

_SIZES = Sizes(jobs=30_000, large=3_000, queued=9_000)
_LEASE_S = 3600.0
_SMALL = QueueRange(under=20 * GIB, largest=70 * GIB)
_LARGE = QueueRange(over=20 * GIB, largest=70 * GIB)

_LARGE_TABLES = r"(jobs|attempts|results)(_\d+)?\b"
_READS_ALL = re.compile(rf"\bSCAN {_LARGE_TABLES}|Seq Scan on {_LARGE_TABLES}")

Action = Callable[[Session], object]


@pytest.fixture(scope="module", params=["sqlite", "sqlite without statistics", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    if request.param == "postgresql":
        database = Database(request.getfixturevalue("postgresql_url"))
        with database.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
        upgrade(database)
    else:
        file = tmp_path_factory.mktemp("filled") / "qbatch.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), file)
        database = Database(f"sqlite:///{file}")
    fill(database, _SIZES)
    if request.param == "sqlite":
        refresh_statistics(database)
    with database.write() as session:
        choose(session)
        jobs.claim(session, _first_message(session), workers.live(session, _LEASE_S)[-1].id, _LEASE_S)
    yield database
    database.dispose()


def choose(session: Session, slots: int = 8) -> list[window.Dispatch]:
    return [
        dispatch
        for needs in (_LARGE, _SMALL)
        for dispatch in window.choose(session, kind=DeviceKind.CUDA, queue=f"q{needs.over}", slots=slots, needs=needs)
    ]


def _first_message(session: Session) -> list[int]:
    first = select(Job.dispatch_id).where(Job.dispatch_id > "").limit(1).scalar_subquery()
    return list(session.scalars(select(Job.id).where(Job.dispatch_id == first)))


def _running(session: Session) -> tuple[int, int]:
    row = session.execute(select(Job.id, Job.attempt).where(Job.state == JobState.RUNNING).limit(1)).one()
    return row.id, row.attempt


def _large(session: Session) -> int:
    return int(session.execute(text("SELECT max(id) - 2 FROM batches")).scalar_one())


def _a_result(session: Session) -> int:
    return int(session.execute(text("SELECT max(job_id) FROM results")).scalar_one())


def _fails(error: Any) -> Action:
    return lambda session: jobs.fail(session, _running(session), error, lease_s=_LEASE_S, **POLICY)


def _succeeds(session: Session) -> object:
    protocol = PROTOCOL.for_device(DeviceKind.CUDA)
    return jobs.succeed(session, _running(session), measured(), protocol=protocol, checkpoint_path="checkpoints/x")


def _finished(session: Session) -> object:
    keys = session.scalars(select(Job.checkpoint_key).where(Job.id <= 400))
    wanted = {(key, "p") for key in keys if key is not None}
    return finished_results.find_finished(session, wanted, device_names=["NVIDIA H100"])


def _shown(session: Session) -> object:
    return whole_jobs(session, [_a_result(session)])


def _known_speed(session: Session) -> object:
    baseline, nf4 = 1, 2
    assert session.get_one(Job, baseline).method == Method.NONE
    return find_known_speeds(session, dict.fromkeys((baseline, nf4), "k" * 64))


def _search(session: Session) -> int:
    """A running job that found what to keep at 16 bits, and waits now for the job of a point."""
    job_id, attempt = _running(session)
    search = SearchRequest(bound=Bound(max_kl=0.04), protocol=SEARCH_PROTOCOL)
    session.execute(update(Job).where(Job.id == job_id).values(search=search.to_json()))
    assert jobs.searched(session, (job_id, attempt), KEY, a_search())
    return job_id


def _point_of(session: Session, search: int) -> int:
    return session.execute(select(Job.id).where(Job.search_job_id == search)).scalar_one()


def _point_ends(session: Session) -> object:
    point, worker = _point_of(session, _search(session)), workers.live(session, _LEASE_S)[-1].id
    ((job_id, attempt),) = [(one.job_id, one.attempt) for one in jobs.claim(session, [point], worker, _LEASE_S)]
    row = measured_with(0.1, 1200)
    protocol = PROTOCOL.for_device(DeviceKind.CUDA)
    return jobs.succeed(session, (job_id, attempt), row, protocol=protocol, checkpoint_path="checkpoints/x")


def _adapter_succeeds(session: Session) -> object:
    row = measured_with(0.01, 1200)
    row = replace(row, details=replace(row.details, base_key="b" * 64))
    protocol = PROTOCOL.for_device(DeviceKind.CUDA)
    return jobs.succeed(session, _running(session), row, protocol=protocol, checkpoint_path="checkpoints/x")


def _publishes(session: Session) -> object:
    """The last transaction of a submit: a job was answered since it was added, and a search is known."""
    batch_id = add_empty_batch(session, name=None, priority=0)
    session.add(Arrival(batch_id=batch_id))
    session.flush()
    last = session.get_one(Job, session.execute(select(func.max(Job.id))).scalar_one())
    asked = spec(device=DeviceKind.CUDA)
    row = replace(measured(), details=replace(measured().details, checkpoint_key="b" * 64))
    protocol = PROTOCOL.for_device(DeviceKind.CUDA)
    jobs.succeed(session, (last.id, last.attempt), row, protocol=protocol, checkpoint_path="checkpoints/x")
    searches.add(session, KEY, last.id, a_search(), again=False)
    search = SearchRequest(bound=Bound(max_kl=0.04), protocol=SEARCH_PROTOCOL)
    lookup = SubmissionLookup(
        settings=_settings(Path("/nowhere")),
        devices=[(DeviceKind.CUDA, row.device_name)],
        began_at=session.execute(select(db_now(-600.0))).scalar_one(),
        has_searches=True,
    )
    batch = Arriving(batch_id, JobRows(batch_id, priority=0, time_limit_s=None), lambda: nullcontext(session))
    batch.add(
        [
            [NewJob(spec=asked, bits=4, checkpoint_key="b" * 64)],
            [NewJob(spec=replace(asked, search=search), bits=4, checkpoint_key=KEY)],
            [NewJob(spec=asked, bits=4, checkpoint_key="c" * 64, reused_from=last.id)],
        ]
    )
    assert batch.publish(lookup.look_again) == 2
    return batch


def _settings(folder: Path) -> Settings:
    return Settings(home=folder, storage=folder, cache=folder)


def _fetched_ahead(session: Session) -> object:
    worker_id = workers.live(session, _LEASE_S)[0].id
    found = find_next_bundle(session, [f"q{_LARGE.over}", f"q{_SMALL.over}"], worker_id=worker_id, lease_s=_LEASE_S)
    assert found is not None
    return is_worth_fetching(session, found.job_id, worker_id=worker_id)


def _cards(session: Session) -> object:
    """Of as many models as are written at once."""
    found = measured_checkpoints(session, range(1, 300, 3))
    assert len(found) > 100
    return found


def _takes_out(session: Session) -> object:
    path = session.execute(select(Result.checkpoint_path).where(Result.job_id == _a_result(session))).scalar_one()
    assert path is not None
    checkpoints.checkpoints_at(session, [path], lock=True)
    return checkpoints.take_out(session, path)


_FILTERS = {
    "a scheme": ResultFilter(schemes=[Method.NF4]),
    "models": ResultFilter(models=["organization-7/*"]),
    "a device": ResultFilter(devices=["H100"]),
    "all of them": ResultFilter(schemes=[Method.NF4], models=["organization-7/*"], devices=["H100"]),
}

ACTIONS: dict[str, Action] = {
    "a tick, the window full": choose,
    "a tick, one slot free": lambda session: choose(session, slots=9),
    "take what no worker reads back": lambda session: window.recall(session, ["another"]),
    "messages that wait": window.waiting_messages,
    "a scan for lost messages": lambda session: window.record_scan(
        session, missing=list(window.waiting_messages(session))[:3], present=list(window.waiting_messages(session))[3:]
    ),
    "claim": lambda session: jobs.claim(session, _first_message(session), 1, _LEASE_S),
    "heartbeat": lambda session: jobs.heartbeat(session, [_running(session)], _LEASE_S),
    "hand back": lambda session: jobs.hand_back(session, [_running(session)], alone=True),
    "succeed": _succeeds,
    "out of memory": _fails(CudaOom("out of memory")),
    "a device error": _fails(DeviceError("the device failed")),
    "expire": lambda session: jobs.expire(session, **POLICY),
    "jobs that no GPU holds": lambda session: jobs.give_up_too_large(session, _LEASE_S),
    "clock set back": lambda session: jobs.shorten_future_times(session, lease_s=60.0, **POLICY),
    "room awaited": jobs.any_waits_for_space,
    "checkpoints that are written": lambda session: jobs.keys_being_written(session, ["a", "b"], but_by=[1]),
    "answers": _finished,
    "a known speed": _known_speed,
    "health": lambda session: health(session, _LEASE_S),
    "workers": lambda session: listing.list_workers(session, _LEASE_S),
    "the newest batches": lambda session: listing.list_batches(session, limit=20),
    "a batch": lambda session: listing.list_batches(session, [_large(session)]),
    "jobs of a batch": lambda session: listing.list_jobs(session, batch_ids=[_large(session)], limit=50),
    "failed jobs": lambda session: listing.list_jobs(session, states=["failed"], limit=50),
    "how many failed": lambda session: count_jobs(session, states=["failed"]),
    "how many of a batch": lambda session: count_jobs(session, batch_ids=[_large(session)]),
    "results of a batch": lambda session: results.find_results(session, batch_ids=[_large(session)], limit=50),
    "a comparison": lambda session: results_of_first_models(session, 50, only=ResultFilter()),
    "a comparison of a batch": lambda session: results_of_first_models(
        session, 50, batch_ids=[_large(session)], only=ResultFilter()
    ),
    "the best results": lambda session: results.find_results(session, sort="kl_mean", limit=50),
    "the fastest": lambda session: results.find_results(session, sort="-decode_tokens_per_s", limit=50),
    "show": _shown,
    "how long jobs took": past_runs,
    "a look of who watches": lambda session: Watcher([_large(session)], lease_s=_LEASE_S).look(session),
    "a look at all that is open": lambda session: Watcher([], lease_s=_LEASE_S).look(session),
    "how long jobs will take": lambda session: time_left(session, lease_s=_LEASE_S),
    "cancel": lambda session: jobs.cancel(session, job_ids=[_running(session)[0]]),
    "cancel a batch and a job": lambda session: jobs.cancel(session, batch_ids=[1], job_ids=[_running(session)[0]]),
    "whose jobs run": lambda session: running_workers(session, job_ids=[_running(session)[0]]),
    "checkpoints of a job": lambda session: checkpoints.checkpoints_of(session, [], [_a_result(session)]),
    "retry": lambda session: jobs.retry(session, job_ids=[_running(session)[0]]),
    "what a search found": _search,
    "a point of a search ends": _point_ends,
    "cancel a search": lambda session: jobs.cancel(session, job_ids=[_search(session)]),
    "show a search and its points": lambda session: whole_jobs(session, [(found := _search(session)), found + 1]),
    "what searches wait for": lambda session: awaited_jobs(session, [_search(session)]),
    "an earlier search answers": lambda session: searches.newest(session, [KEY]),
    "an adapter is recorded": _adapter_succeeds,
    "who has an adapter's checkpoint": lambda session: checkpoint_needs.users_of(session, ["b" * 64]),
    "a submit ends": _publishes,
    "what to fetch ahead": _fetched_ahead,
    "devices that no worker has": lambda session: lacking_devices(session, [1, 2, 3], _LEASE_S),
    "a model card": lambda session: measured_checkpoints(session, [_a_result(session)]),
    "model cards": _cards,
    "whose cards a batch has": lambda session: jobs_with_checkpoints(session, [1]),
    "a checkpoint is taken out": _takes_out,
    "the best results of a batch that a filter lets through": lambda session: results.find_results(
        session, batch_ids=[1], only=_FILTERS["all of them"], sort="kl_mean", limit=50
    ),
}


def plans(database: Database, action: Action) -> dict[str, str]:
    """Each statement of an action, with how the database runs it."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    with database.write() as session:
        event.listen(database.engine, "before_cursor_execute", note)
        try:
            action(session)
        finally:
            event.remove(database.engine, "before_cursor_execute", note)
        driver: Any = session.connection().connection.dbapi_connection
        explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
        found = {
            statement: "\n".join(str(line[-1]) for line in driver.execute(explain + statement, parameters))
            for statement, parameters in sent
            if statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE"))
        }
        session.rollback()
    assert found
    return found


@pytest.mark.parametrize("name", ACTIONS)
def test_what_is_asked_often_reads_no_large_table_as_a_whole(filled: Database, name: str) -> None:
    for statement, plan in plans(filled, ACTIONS[name]).items():
        assert not _READS_ALL.search(plan), f"{statement}\n{plan}"


def test_all_rows_of_the_view_have_their_baselines_by_an_index(filled: Database) -> None:
    (plan,) = plans(filled, lambda session: session.execute(text("SELECT * FROM result_rows"))).values()
    assert "ix_jobs_baselines" in plan


def test_keep_reads_no_large_table_as_a_whole(filled: Database, tmp_path: Path) -> None:
    """It asks in transactions of its own."""

    def keep(session: Session) -> None:
        rows = results.find_results(session, batch_ids=[1])
        paths = [row.checkpoint_path for row in rows if row.checkpoint_path is not None][:2]
        for path in paths:
            (tmp_path / path).mkdir(parents=True)
        removal = plan_removal(filled, _settings(tmp_path), paths=paths, within=[1])
        removed = carry_out(filled, _settings(tmp_path), removal, dry_run=True)
        assert [kind.number for kind in removed if kind.what == "checkpoints"] == [2]

    for statement, plan in plans(filled, keep).items():
        assert not _READS_ALL.search(plan), f"{statement}\n{plan}"


# SQLite reads a table as a whole, row by row in the order of an index that does not have what is asked for.
_LOOKS_UP_EACH = re.compile(r"\bSCAN \w+ USING INDEX (?!ix_checkpoints_gone)")


@pytest.mark.parametrize("name", _FILTERS)
def test_a_filter_by_kl_reads_all_jobs_once_and_only_ids(filled: Database, name: str) -> None:
    """No index has what a filter asks for in the order of a figure."""
    explained = plans(
        filled, lambda session: results.find_results(session, only=_FILTERS[name], sort="kl_mean", limit=50)
    )
    ((statement, plan),) = [one for one in explained.items() if _READS_ALL.search(one[1])]
    assert statement.split()[:3] == ["SELECT", "jobs.id", "FROM"]
    assert not _LOOKS_UP_EACH.search(plan), f"{statement}\n{plan}"


_MANY = 3 * VALUES_AT_ONCE


@pytest.mark.parametrize(
    "action",
    [
        lambda session: results.find_results(session, sort="-kl_mean", limit=_MANY),
        lambda session: results.find_results(session, limit=_MANY),
        lambda session: results.find_others(session, results.find_results(session, limit=2 * _MANY)[::3]),
        lambda session: results_of_first_models(session, _MANY, only=ResultFilter()).rows,
        lambda session: listing.list_batches(session, limit=_MANY),
        lambda session: listing.list_jobs(session, limit=_MANY),
        lambda session: whole_jobs(session, range(1, _MANY)),
    ],
    ids=["results by KL", "results", "others of the same models", "first models", "batches", "jobs", "all about jobs"],
)
def test_no_statement_has_a_value_for_each_row_that_is_asked_for(filled: Database, action: Action) -> None:
    """PostgreSQL takes 65,535 in one."""
    most = 0

    def look(_connection: Any, _cursor: Any, _statement: str, values: Any, *_: Any) -> None:
        nonlocal most
        most = max(most, len(values))

    event.listen(filled.engine, "before_cursor_execute", look)
    try:
        with filled.read() as session:
            assert action(session)
    finally:
        event.remove(filled.engine, "before_cursor_execute", look)
    assert most <= VALUES_AT_ONCE + 20


def test_what_removes_a_checkpoint_finds_it_by_its_path(filled: Database) -> None:
    found = plans(filled, _takes_out)
    assert any("ix_checkpoints_path" in plan for plan in found.values())
    for statement, plan in found.items():
        assert not re.search(r"(SCAN|Seq Scan on) checkpoints", plan), f"{statement}\n{plan}"


_READS_THE_BACKLOG = re.compile(
    r"Index Cond: \(\(state\)::text = 'queued'|Bitmap Index Scan on ix_jobs_(waiting\b|state)"
)


@pytest.mark.parametrize(
    "name", ["a tick, the window full", "a tick, one slot free", "a scan for lost messages", "claim", "a submit ends"]
)
def test_what_is_sent_and_claimed_is_not_found_among_all_that_waits(filled: Database, name: str) -> None:
    """On SQLite, the next test counts its steps."""
    for statement, plan in plans(filled, ACTIONS[name]).items():
        assert not _READS_THE_BACKLOG.search(plan), f"{statement}\n{plan}"


@pytest.mark.parametrize(
    "name", ["a tick, the window full", "a tick, one slot free", "jobs that no GPU holds", "a submit ends"]
)
def test_these_take_no_more_with_a_longer_backlog(sqlite_database: Database, tmp_path: Path, name: str) -> None:
    steps = []
    for database in _copies(tmp_path, *(Sizes(jobs=queued + 600, large=100, queued=queued) for queued in (600, 6000))):
        with database.write() as session:
            choose(session)
        steps.append(_steps(database, ACTIONS[name]))
    assert steps[1] < 1.5 * steps[0]


@pytest.mark.parametrize("name", _FILTERS)
def test_first_rows_of_a_filter_are_no_more_with_a_longer_history(
    sqlite_database: Database, tmp_path: Path, name: str
) -> None:
    """SQLite says that it scans the jobs, and ends with the last row that is shown. PostgreSQL walks an index."""
    steps = [
        _steps(database, lambda session: results.find_results(session, only=_FILTERS[name], limit=5))
        for database in _copies(tmp_path, *(Sizes(jobs=ended + 600, large=100, queued=600) for ended in (1200, 6000)))
    ]
    assert steps[1] < 1.5 * steps[0]


def _newest(session: Session) -> list[int]:
    return list(session.scalars(select(Job.batch_id).where(Job.id == _a_result(session))))


_OF_THE_NEWEST: dict[str, Action] = {
    "its first results": lambda session: results.find_results(session, batch_ids=_newest(session), limit=5),
    "its results": lambda session: results.find_results(session, batch_ids=_newest(session)),
    "a comparison": lambda session: results_of_first_models(
        session, 5, batch_ids=_newest(session), only=ResultFilter()
    ),
    "what its results are compared with": lambda session: results.find_others(
        session, results.find_results(session, batch_ids=_newest(session), limit=2)
    ),
    "a model card": lambda session: measured_checkpoints(session, [_a_result(session)]),
}


@pytest.mark.parametrize("name", _OF_THE_NEWEST)
def test_models_that_are_submitted_every_night_make_no_batch_slower(
    sqlite_database: Database, tmp_path: Path, name: str
) -> None:
    steps = []
    for database in _copies(tmp_path, *(Sizes(jobs=30 * nights, large=10, queued=3, small=10) for nights in (8, 80))):
        with database.write() as session:
            session.execute(text("UPDATE jobs SET location = '/models/' || (id / 3 % 10)"))
        steps.append(_steps(database, _OF_THE_NEWEST[name]))
    assert steps[1] < 1.5 * steps[0]


def test_all_rows_of_the_view_take_time_in_proportion_to_their_number(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """Also where one model has all the jobs."""
    steps = []
    for database in _copies(tmp_path, *(Sizes(jobs=jobs_, large=10, queued=3, small=10) for jobs_ in (300, 3_000))):
        with database.write() as session:
            session.execute(text("UPDATE jobs SET location = '/models/a'"))
        steps.append(_steps(database, lambda session: session.execute(text("SELECT * FROM result_rows")).all()))
    assert steps[1] < 15 * steps[0]


@pytest.mark.parametrize("name", ["how long jobs will take", "a look at all that is open", "a submit ends"])
def test_these_take_no_more_with_a_longer_history(sqlite_database: Database, tmp_path: Path, name: str) -> None:
    steps = []
    for database in _copies(tmp_path, *(Sizes(jobs=ended + 600, large=100, queued=600) for ended in (900, 6000))):
        with database.write() as session:
            choose(session)
            sent = session.scalars(select(Job.id).where(Job.dispatch_id > "")).all()
            jobs.claim(session, sent, workers.live(session, _LEASE_S)[-1].id, _LEASE_S)
        steps.append(_steps(database, ACTIONS[name]))
    assert steps[1] < 1.5 * steps[0]


def _copies(folder: Path, *sizes: Sizes) -> Iterator[Database]:
    """Copies of the empty database of ``sqlite_database``, filled."""
    for number, size in enumerate(sizes):
        file = folder / f"{number}.db"
        shutil.copy(folder / "qbatch.db", file)
        database = Database(f"sqlite:///{file}")
        fill(database, size)
        yield database
        database.dispose()


def _steps(database: Database, action: Action) -> int:
    """How many hundred steps SQLite's machine takes for an action."""
    count = 0

    def another() -> int:
        nonlocal count
        count += 1
        return 0

    with Session(database.engine) as session, session.begin() as transaction:
        driver: Any = session.connection().connection.dbapi_connection
        driver.set_progress_handler(another, 100)
        action(session)
        driver.set_progress_handler(None, 0)
        transaction.rollback()
    return count

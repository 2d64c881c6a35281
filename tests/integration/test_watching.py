"""What is seen of batches by whoever looks again and again, on both databases."""

from __future__ import annotations

import pytest

from qbatch.core.domain import DeviceKind, JobState, Method, Stage
from qbatch.core.errors import SourceCorrupt
from qbatch.core.job_progress import JobProgress
from qbatch.core.watched import Snapshot
from qbatch.models_db import jobs, leases, pauses
from qbatch.models_db.lacking_devices import lacking_devices
from qbatch.models_db.listing import list_jobs
from qbatch.models_db.session import Database
from qbatch.models_db.watching import Watcher
from qbatch.scheduler.wait import wait
from tests.rows import a_batch, a_gpu, a_worker, bundle, claim, fail, succeed

BOTH = (Method.NF4, Method.INT8)


class Onlooker:
    def __init__(self, database: Database, *batch_ids: int) -> None:
        self._database = database
        self._watcher = Watcher(batch_ids, lease_s=60.0)

    def look(self) -> Snapshot:
        with self._database.read() as session:
            return self._watcher.look(session)

    def news(self) -> list[tuple[str, str]]:
        return [(job.job_id, job.stage or job.state.value) for job in self.look().news]


def claim_in_order(database: Database, ids: list[int], worker: int) -> list[jobs.Token]:
    return sorted(claim(database, ids, worker))


def note(database: Database, token: jobs.Token, **values: object) -> None:
    with database.write() as session:
        jobs.note(session, token, **values)  # type: ignore[arg-type]


def test_each_change_is_news_once(database: Database) -> None:
    batch, ids = a_batch(database, bundle("/models/a", *BOTH), bundle("/models/b", *BOTH))
    onlooker, worker = Onlooker(database, batch), a_worker(database)
    assert onlooker.news() == []
    first, second = claim_in_order(database, ids[:2], worker)
    assert onlooker.news() == [(f"j{ids[0]}", "fetching"), (f"j{ids[1]}", "fetching")]
    note(database, first, stage=Stage.QUANTIZING, work_started=True)
    assert onlooker.news() == [(f"j{ids[0]}", "quantizing")]
    note(database, first, progress=JobProgress(bytes_read=5).to_json())
    assert onlooker.news() == []
    assert succeed(database, first)
    assert fail(database, second, SourceCorrupt("torn"))
    assert onlooker.news() == [(f"j{ids[0]}", "succeeded"), (f"j{ids[1]}", "failed")]
    assert onlooker.news() == []
    third, _ = claim_in_order(database, ids[2:], worker)
    onlooker.look()
    with database.write() as session:
        jobs.hand_back(session, [third], alone=False)
    assert onlooker.news() == [(f"j{ids[2]}", "queued")]


def test_a_job_that_ended_between_two_looks_is_news_too(database: Database) -> None:
    batch, ids = a_batch(database, bundle("/models/a", *BOTH), bundle("/models/b", *BOTH))
    onlooker, worker = Onlooker(database, batch), a_worker(database)
    onlooker.look()
    (token,) = claim_in_order(database, ids[:1], worker)
    assert fail(database, token, SourceCorrupt("torn"))
    with database.write() as session:
        jobs.cancel(session, job_ids=[ids[3]])
    (failed, cancelled) = onlooker.look().news
    assert (failed.job_id, failed.error, failed.state) == (f"j{ids[0]}", "source_corrupt: torn", JobState.FAILED)
    assert cancelled.state is JobState.CANCELLED
    assert onlooker.news() == []


def test_who_comes_late_is_told_of_the_failures_and_of_what_runs(database: Database) -> None:
    batch, ids = a_batch(database, bundle("/models/a", *BOTH))
    first, second = claim_in_order(database, ids, a_worker(database))
    assert Onlooker(database, batch).news() == [(f"j{job_id}", "fetching") for job_id in ids]
    assert succeed(database, first)
    assert fail(database, second, SourceCorrupt("torn"))
    look = Onlooker(database, batch).look()
    assert [job.job_id for job in look.news] == [f"j{ids[1]}"]
    assert (look.is_open, look.have_succeeded) == (False, False)


def test_of_thousands_of_changes_only_some_are_told(database: Database) -> None:
    batch, ids = a_batch(database, *(bundle(f"/models/{n}", *BOTH) for n in range(40)))
    onlooker = Onlooker(database, batch)
    onlooker.look()
    with database.write() as session:
        jobs.cancel(session, batch_ids=[batch])
    look = onlooker.look()
    assert (len(look.news), look.more_news) == (50, len(ids) - 50)


def test_without_a_batch_all_that_are_open_are_watched_and_those_that_come(database: Database) -> None:
    ended, done = a_batch(database, bundle("/models/a", *BOTH))
    with database.write() as session:
        jobs.cancel(session, batch_ids=[ended])
    onlooker = Onlooker(database)
    assert onlooker.look() == Snapshot(batches=(), has_scheduler=False)
    first, ids = a_batch(database, bundle("/models/b", *BOTH))
    assert [batch.batch_id for batch in onlooker.look().batches] == [f"b{first}"]
    second, _ = a_batch(database, bundle("/models/c", *BOTH))
    with database.write() as session:
        jobs.cancel(session, batch_ids=[first])
    look = onlooker.look()
    assert [batch.batch_id for batch in look.batches] == [f"b{first}", f"b{second}"], "what was seen stays"
    assert {job.job_id for job in look.news} == {f"j{job_id}" for job_id in ids}
    assert f"j{done[0]}" not in {job.job_id for job in look.news}


def test_what_runs_is_seen_with_its_worker_and_its_progress(database: Database) -> None:
    batch, ids = a_batch(database, bundle("/models/a", *BOTH))
    worker = a_worker(database, "w1")
    onlooker = Onlooker(database, batch)
    assert (onlooker.look().awaits_worker, onlooker.look().live_workers) == (False, 1)
    first, _ = claim_in_order(database, ids, worker)
    progress = JobProgress(bytes_read=5, bytes_written=1, bytes_total=9, step="speed, round 1/3")
    note(database, first, stage=Stage.BENCHMARKING, work_started=True, progress=progress.to_json())
    look = onlooker.look()
    active, idle = look.running
    assert (active.progress, active.is_active, idle.is_active) == (progress, True, False)
    assert active.elapsed_s is not None
    (watched,) = look.workers
    assert watched.jobs == (f"j{ids[0]}", f"j{ids[1]}")
    assert succeed(database, first)
    with database.read() as session:
        ended, _ = list_jobs(session)
    assert ended["progress"] == {"bytes_read": 5, "bytes_written": 1, "bytes_total": 9}, "nothing is measured of it now"


def test_a_batch_for_which_no_worker_has_the_device_is_seen(database: Database) -> None:
    batch, ids = a_batch(database, bundle("/models/a", *BOTH, device=DeviceKind.CUDA))
    a_batch(database, bundle("/models/a", *BOTH, device=DeviceKind.CPU))
    onlooker = Onlooker(database)
    assert [one.lacks_device for one in onlooker.look().batches] == [None, None], "no worker is live at all"
    a_worker(database, "w1")
    look = onlooker.look()
    assert ([one.lacks_device for one in look.batches], look.has_scheduler) == ([DeviceKind.CUDA, None], False)
    with database.write() as session:
        leases.acquire(session, leases.LEAD, "here", 60.0)
    assert onlooker.look().has_scheduler
    claim(database, ids, a_gpu(database, 24))
    assert [one.lacks_device for one in Onlooker(database, batch).look().batches] == [None]


def test_of_many_batches_each_is_asked_for_its_device(database: Database) -> None:
    on_gpu = bundle("/models/a", *BOTH, device=DeviceKind.CUDA)
    batches = [a_batch(database, bundle() if number == 0 else on_gpu)[0] for number in range(30)]
    a_worker(database)
    with database.read() as session:
        lacking = lacking_devices(session, batches, 60.0)
    assert lacking == dict.fromkeys(batches[1:], DeviceKind.CUDA)


def test_a_pause_is_seen(database: Database) -> None:
    batch, _ = a_batch(database, bundle("/models/a", *BOTH))
    with database.write() as session:
        pauses.pause(session, "disk", "j1 needs room", needed_bytes=None, for_s=60.0)
    assert Onlooker(database, batch).look().pauses == ("j1 needs room",)


def test_waiting_survives_a_database_that_goes_away(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = a_batch(database, bundle("/models/a", *BOTH))
    monkeypatch.setattr("qbatch.scheduler.wait._POLL_S", 0.01)
    looks: list[Snapshot] = []
    silences: list[str] = []
    url = database.engine.url
    away = url.set(port=1) if not database.is_sqlite else url.set(database=f"{url.database}-away/qbatch.db")
    gone = Database(away.render_as_string(hide_password=False))

    class Flickering:
        """The first look and the third reach the database."""

        def __init__(self) -> None:
            self.asked = 0

        def read(self) -> object:
            self.asked += 1
            return (gone if self.asked == 2 else database).read()

        def require_own(self, _session: object) -> None:
            if self.asked == 3:
                with database.write() as writing:
                    jobs.cancel(writing, batch_ids=[batch])

    last = wait(
        Flickering(),  # type: ignore[arg-type]
        Watcher([batch], lease_s=60.0),
        timeout_s=60.0,
        on_update=looks.append,
        on_silence=silences.append,
        on_poll=lambda: None,
    )
    assert [look.is_open for look in looks] == [True, False]
    assert last == looks[-1]
    assert len(silences) == 1

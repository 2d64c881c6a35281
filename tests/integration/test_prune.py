"""Prune removes completely what ended long ago, and keeps what may still be needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, update

from qbatch.core.digest import Checksums
from qbatch.core.domain import JobState, Method
from qbatch.core.file_stat import Mounts, stat_file
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, file_digests, jobs
from qbatch.models_db.batches import NewJob
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.database_id import database_id
from qbatch.models_db.finished_results import keep
from qbatch.models_db.job_record import job_records
from qbatch.models_db.results import find_results
from qbatch.models_db.retention import delete_jobs, find_prunable
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Attempt, Batch, Checkpoint, FileDigestRow, Job, Result
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.housekeeping.prune import prune
from qbatch.worker.serving.recorder import Recorder
from tests.migrating import downgrade_to
from tests.rows import PROTOCOL, a_batch, a_worker, add_batch, bundle, claim, measured, spec, states, succeed
from tests.waiting import until

DAY_S = 86_400.0
MONTH_S = 30 * DAY_S


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})


@pytest.fixture
def run(database: Database, settings: Settings) -> Callable[..., dict[str, tuple[int, int | None]]]:
    def go(*, dry_run: bool = False) -> dict[str, tuple[int, int | None]]:
        pruned = prune(database, settings, MONTH_S, dry_run=dry_run)
        assert [problem for kind in pruned for problem in kind.problems] == []
        return {kind.what: (kind.number, kind.size_bytes) for kind in pruned}

    return go


Run = Callable[..., dict[str, tuple[int, int | None]]]


def ended(database: Database, *bundles: list[NewJob], days: float = 0.0) -> tuple[int, list[int]]:
    """A batch whose jobs succeeded, each with a checkpoint, ``days`` ago."""
    batch_id, ids = a_batch(database, *bundles)
    for token in claim(database, ids, a_worker(database)):
        assert succeed(database, token)
        with database.write() as session:
            checkpoints.record(
                session,
                key=f"{token[0]:064}",
                path=f"c/{token[0]}",
                root_sha256="0" * 64,
                disk_bytes=1,
                job_id=token[0],
            )
    age(database, batch_id, days)
    return batch_id, ids


def answered(database: Database, by: int, days: float = 0.0) -> tuple[int, int]:
    """A batch of one job that ``by`` answers; (batch, job)."""
    with database.write() as session:
        batch_id = add_batch(session, [[NewJob(spec=spec(), bits=4, reused_from=by)]])
        job_id = session.scalars(select(Job.id).where(Job.batch_id == batch_id)).one()
    age(database, batch_id, days)
    return batch_id, job_id


def age(database: Database, batch_id: int, days: float) -> None:
    then = db_now(-days * DAY_S)
    with database.write() as session:
        session.execute(update(Batch).where(Batch.id == batch_id).values(created_at=then))
        of_batch = update(Job).where(Job.batch_id == batch_id)
        session.execute(of_batch.values(created_at=then))
        session.execute(of_batch.where(Job.started_at.is_not(None)).values(started_at=then))
        session.execute(of_batch.where(Job.finished_at.is_not(None)).values(finished_at=then))


def count(database: Database, table: type[Any]) -> int:
    with database.read() as session:
        return session.execute(select(func.count()).select_from(table)).scalar_one()


def a_file(path: Path, days: float, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))
    return path


def a_reference(settings: Settings, name: str, days: float) -> Path:
    folder = settings.storage / "base-logits" / name
    a_file(folder / "0000.safetensors", days, 90)
    a_file(folder / "reference.json", days)
    return folder


def test_a_batch_that_ended_long_ago_goes_with_all_its_rows(database: Database, run: Run) -> None:
    ended(database, days=31)
    _, young = ended(database, days=29)
    assert run()["batches"] == (1, None)
    assert sorted(states(database)) == young
    assert [count(database, table) for table in (Batch, Job, Attempt, Result)] == [1, 3, 3, 3]


def test_a_batch_goes_by_the_job_that_ended_last(database: Database, run: Run) -> None:
    _, ids = ended(database, days=40)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[-1]).values(finished_at=db_now(-DAY_S)))
    assert run()["jobs"] == (0, None)
    assert sorted(states(database)) == ids


def test_a_batch_with_an_open_job_stays_whole(database: Database, run: Run) -> None:
    batch_id, ids = ended(database, days=40)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[0]).values(state=JobState.CANCELLED))
        jobs.retry(session, job_ids=[ids[0]])
    age(database, batch_id, 40)
    assert run()["jobs"] == (0, None)
    assert states(database)[ids[0]] == "queued"


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_failed_and_cancelled_jobs_are_pruned_too(database: Database, run: Run, state: JobState) -> None:
    _, ids = ended(database, days=40)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[0]).values(state=state))
    assert run()["jobs"] == (3, None)


def test_a_result_that_answers_a_kept_batch_is_kept(database: Database, run: Run) -> None:
    batch_id, ids = ended(database, bundle("/models/a"), bundle("/models/b"), days=60)
    later, job_id = answered(database, ids[1], days=3)
    assert (run()["batches"], run()["jobs"]) == ((0, None), (0, None)), "a second run finds no more to do"
    assert sorted(states(database)) == [*ids[:3], job_id], "the bundle of the other model went"
    with database.read() as session:
        (row,) = find_results(session, batch_ids=[later])
    assert row.checkpoint_path == "checkpoints/x"
    age(database, later, 31)
    assert run()["batches"] == (2, None)
    assert states(database) == {}
    assert count(database, Batch) == 0
    assert batch_id != later


def test_results_that_answer_a_kept_bundle_are_kept(database: Database, run: Run) -> None:
    """Of a bundle that is kept for one of its jobs, another one may have its result from elsewhere."""
    _, first = ended(database, days=90)
    second_batch, second = ended(database, days=60)
    with database.write() as session:
        borrower = session.get_one(Job, second[0])
        session.delete(session.get_one(Result, borrower.id))
        borrower.reused_from = first[0]
    _, young = answered(database, second[1])
    assert run()["jobs"] == (0, None)
    assert sorted(states(database)) == [*first, *second, young]
    assert second_batch


def test_more_jobs_than_one_transaction_takes(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database, *(bundle(f"/models/{number}") for number in range(150)))
    with database.write() as session:
        jobs.cancel(session, batch_ids=[1])
    age(database, 1, 40)
    begun: list[int] = []
    event.listen(database.engine, "commit", lambda _: begun.append(1))
    found = {kind.what: kind.number for kind in prune(database, settings, MONTH_S)}
    assert found["jobs"] == len(ids) == 450
    assert states(database) == {}
    assert len(begun) >= 4, "three of jobs, one of batches"


def test_checkpoints_of_pruned_jobs_stay_on_record(database: Database, settings: Settings, run: Run) -> None:
    _, ids = ended(database, days=40)
    run()
    with database.read() as session:
        assert [row.job_id for row in checkpoints.all_checkpoints(session)] == [None] * 3
    _, fresh = a_batch(database)
    with database.write() as session:
        jobs.claim(session, fresh, a_worker(database), 60.0)
        jobs.note(session, (fresh[1], 1), checkpoint_key=f"{ids[1]:064}")
    with database.read() as session:
        (record,) = job_records(session, [fresh[1]])
    assert record.checkpoint is not None
    assert record.checkpoint.written_by is None


def test_an_outcome_that_was_spooled_for_longer_changes_nothing(
    database: Database, settings: Settings, run: Run
) -> None:
    _, ids = ended(database, days=40)
    run()
    published = Published(
        key="k" * 64, path="c/k", root_sha256="r" * 64, disk_bytes=7, audit={}, quantize_s=1.0, versions={}
    )
    recorder = Recorder(database, settings)
    recorder.note_checkpoint(ids[0], published)
    recorder.succeed((ids[0], 1), measured(), PROTOCOL.for_device(spec().device), published)
    assert (count(database, Job), count(database, Result)) == (0, 0)
    with database.read() as session:
        assert session.get_one(Checkpoint, "k" * 64).job_id is None


def own_logs(database: Database, settings: Settings) -> Path:
    with database.read() as session:
        return settings.logs_of(database_id(session))


def test_logs_go_with_the_last_job_of_their_bundle(database: Database, settings: Settings, run: Run) -> None:
    _, ids = ended(database, bundle("/models/a"), bundle("/models/b"), days=60)
    answered(database, ids[1], days=3)
    kept = a_file(own_logs(database, settings) / f"j{ids[0]}-1.log", 60)
    old = [a_file(own_logs(database, settings) / f"j{ids[3]}-{attempt}.log", 60) for attempt in (1, 2)]
    orphan = a_file(own_logs(database, settings) / "j999-1.runner.log", 60)
    stays = [
        kept,
        a_file(own_logs(database, settings) / "j998-1.log", 1),
        a_file(own_logs(database, settings) / "notes.txt", 60),
        a_file(settings.logs / "another" / f"j{ids[3]}-1.log", 60),
        a_file(settings.logs / "j5-1.log", 1),
    ]
    earlier = a_file(settings.logs / "j6-1.log", 60)
    assert run(dry_run=True)["logs"] == (4, 40)
    assert all(path.exists() for path in (*old, orphan, earlier))
    assert run()["logs"] == (4, 40)
    assert not any(path.exists() for path in (*old, orphan, earlier))
    assert all(path.exists() for path in stays)


def test_checksums_of_files_go_that_were_hashed_long_ago(database: Database, run: Run, tmp_path: Path) -> None:
    for name in ("old", "young"):
        (tmp_path / name).write_text(name)
    stats = {name: stat_file(tmp_path / name, Mounts()) for name in ("old", "young")}
    with database.write() as session:
        file_digests.remember(
            session, {stat: Checksums(chunk_sha256=("0" * 64,), sha256=None) for stat in stats.values()}
        )
        old = FileDigestRow.path == str(tmp_path / "old")
        session.execute(update(FileDigestRow).where(old).values(hashed_at=db_now(-31 * DAY_S)))
    assert run(dry_run=True)["file digests"] == (1, None)
    assert count(database, FileDigestRow) == 2
    assert run()["file digests"] == (1, None)
    with database.read() as session:
        assert file_digests.known(session, stats.values()).keys() == {stats["young"]}


def test_many_checksums_go_in_transactions_of_a_bounded_size(database: Database, run: Run) -> None:
    with database.write() as session:
        session.add_all(
            FileDigestRow(place=str(n), host="h", path="p", version="v", chunk_sha256=[], hashed_at=db_now(-31 * DAY_S))
            for n in range(1001)
        )
    begun: list[int] = []
    event.listen(database.engine, "commit", lambda _: begun.append(1))
    assert run()["file digests"] == (1001, None)
    assert count(database, FileDigestRow) == 0
    assert len(begun) >= 6


def test_checksums_that_are_kept_anew_meanwhile_stay(database: Database, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    digests = {stat_file(tmp_path / "file", Mounts()): Checksums(chunk_sha256=(), sha256=None)}
    with database.write() as session:
        file_digests.remember(session, digests)
        session.execute(update(FileDigestRow).values(hashed_at=db_now(-31 * DAY_S)))
    with database.read() as session:
        (place,) = file_digests.hashed_before(session, MONTH_S)
    with database.write() as session:
        file_digests.remember(session, digests)
    with database.write() as session:
        assert file_digests.forget(session, [place], MONTH_S) == 0
    assert count(database, FileDigestRow) == 1


def test_rejected_checkpoints_go_by_the_time_in_their_name(settings: Settings, run: Run) -> None:
    model = settings.checkpoints / "llama"
    now_ns = time.time_ns()
    old = model / f"bnb-nf4-0011.rejected-{now_ns - int(31 * DAY_S * 1e9)}"
    stays = [model / "bnb-nf4-0011", model / f"bnb-nf4-0011.rejected-{now_ns}", model / "x.rejected-by-me"]
    for folder in (old, *stays):
        a_file(folder / "model.safetensors", 60, 100)
    assert run()["rejected checkpoints"] == (1, 100)
    assert not old.exists()
    assert all(folder.exists() for folder in stays)


def test_base_outputs_go_when_nobody_has_used_them(settings: Settings, run: Run) -> None:
    old, young = a_reference(settings, "old", 40), a_reference(settings, "young", 20)
    assert run(dry_run=True)["base outputs"] == (1, 100)
    assert old.exists()
    assert run()["base outputs"] == (1, 100)
    assert (old.exists(), young.exists()) == (False, True)
    assert len(list(old.parent.iterdir())) == 1, "nothing of it is left"


def test_base_outputs_of_a_batch_that_stays_stay(database: Database, settings: Settings, run: Run) -> None:
    """Its baseline may have ended long before its last job."""
    batch_id, ids = ended(database, days=50)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[-1]).values(finished_at=db_now(-DAY_S)))
    used, unused = a_reference(settings, "used", 50), a_reference(settings, "unused", 51)
    run()
    assert (used.exists(), unused.exists()) == (True, False)
    age(database, batch_id, 50)
    run()
    assert not used.exists()


def test_base_outputs_stay_for_an_open_batch_whose_baseline_was_answered(
    database: Database, settings: Settings, run: Run
) -> None:
    _, ids = ended(database, days=50)
    with database.write() as session:
        answer = NewJob(spec=spec(method=Method.NONE), bits=16, reused_from=ids[0])
        add_batch(session, [[answer, NewJob(spec=spec(method=Method.INT8), bits=8)]])
    used, unused = a_reference(settings, "used", 49), a_reference(settings, "unused", 51)
    run()
    assert (used.exists(), unused.exists()) == (True, False)


def test_outputs_that_may_be_in_use_are_kept(sqlite_database: Database, settings: Settings) -> None:
    folder = a_reference(settings, "in use", 0)
    time.sleep(0.01)
    prune(sqlite_database, settings, 0.001)
    assert folder.exists()


def test_a_dry_run_says_what_the_run_will_do_and_does_nothing(database: Database, settings: Settings, run: Run) -> None:
    ended(database, bundle("/models/a"), bundle("/models/b"), days=60)
    _, partly = ended(database, bundle("/models/a"), bundle("/models/b"), days=50)
    answered(database, partly[0], days=3)
    a_file(own_logs(database, settings) / "j1-1.log", 60)
    rows = [count(database, table) for table in (Batch, Job, Attempt, Result, Checkpoint)]
    promised = run(dry_run=True)
    assert [count(database, table) for table in (Batch, Job, Attempt, Result, Checkpoint)] == rows
    assert promised == run()
    assert (promised["batches"], promised["jobs"], promised["logs"]) == ((1, None), (9, None), (1, 10))


def test_files_that_cannot_be_removed_are_reported(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = a_reference(settings, "stuck", 40), a_reference(settings, "other", 40)
    remove = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(source) == stuck:  # as root may rename anything, no mode would do
            raise PermissionError(13, "Permission denied", str(source))
        remove(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    (found,) = [kind for kind in prune(sqlite_database, settings, MONTH_S) if kind.what == "base outputs"]
    assert found.problems == (f"{stuck} cannot be removed: Permission denied",)
    assert (found.number, stuck.exists(), other.exists()) == (1, True, False)


def test_a_result_that_is_just_being_referred_to_is_not_deleted(postgresql_database: Database) -> None:
    database = postgresql_database
    _, ids = ended(database, days=40)
    with database.write() as submitting:
        assert keep(submitting, [ids[1]]) == {ids[1]}
        with database.write() as pruning:
            assert delete_jobs(pruning, ids, MONTH_S) == 2, "it waits for nobody"
        add_batch(submitting, [[NewJob(spec=spec(), bits=4, reused_from=ids[1])]])
    assert ids[1] in states(database)
    with database.write() as session:
        assert delete_jobs(session, [ids[1]], MONTH_S) == 0


def test_a_result_that_is_just_being_deleted_answers_nobody(postgresql_database: Database) -> None:
    database = postgresql_database
    _, ids = ended(database, days=40)
    answers: list[object] = []

    def ask() -> None:
        with database.write() as session:
            answers.append(keep(session, [ids[1]]))

    asking = threading.Thread(target=ask)
    with database.write() as pruning:
        assert delete_jobs(pruning, ids, MONTH_S) == 3
        asking.start()
        asking.join(0.5)
        assert asking.is_alive(), "it waits to see what becomes of the row"
    until(lambda: answers)
    asking.join()
    assert answers == [set()]


def test_jobs_retried_meanwhile_are_not_deleted(database: Database) -> None:
    _, ids = ended(database, days=40)
    with database.read() as session:
        found = find_prunable(session, MONTH_S)
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[0]).values(state=JobState.CANCELLED))
        jobs.retry(session, job_ids=[ids[0]])
    with database.write() as session:
        assert delete_jobs(session, found.job_ids, MONTH_S) == 0


def test_checkpoints_of_an_earlier_schema_are_kept(database: Database) -> None:
    _, ids = ended(database)
    downgrade_to(database, "0002")
    upgrade(database)
    with database.read() as session:
        assert [row.job_id for row in checkpoints.all_checkpoints(session)] == ids

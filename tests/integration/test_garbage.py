"""``gc``, ``rm`` and ``du`` remove and show what nobody needs, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select, text

from qbatch.core.domain import DeviceKind, Method
from qbatch.core.errors import StorageError, UsageError
from qbatch.core.job_log import runner_log
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, finished_results, jobs
from qbatch.models_db.checkpoint_needs import why_needed
from qbatch.models_db.job_record import job_records
from qbatch.models_db.results import find_results
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Batch, Checkpoint, Job, Result
from qbatch.worker.checkpoints.ownership import why_not_ours
from qbatch.worker.checkpoints.published import find_published, slug
from qbatch.worker.files.own_staging import OwnStaging
from qbatch.worker.files.staging import stage
from qbatch.worker.housekeeping import checkpoint_remover, garbage
from qbatch.worker.housekeeping.checkpoint_remover import CheckpointRemover, StoredCheckpoint, remover
from qbatch.worker.housekeeping.garbage import collect_garbage
from qbatch.worker.housekeeping.holdings import Holding, HoldingKind, find_holdings
from qbatch.worker.housekeeping.removed_targets import carry_out, plan_removal
from qbatch.worker.housekeeping.stale_files import Pruned, aside_of
from tests.rows import PROTOCOL, a_batch, a_worker, bundle, claim, measured, states, succeed
from tests.stored_checkpoints import Made, a_measured_batch, identity_of, key_of, put_checkpoint, set_key

DAY_S = 86_400.0
OTHER = str(uuid.uuid4())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})
    settings.storage.mkdir(parents=True)
    return settings


def gc(database: Database, settings: Settings, days: float = 7, *, dry_run: bool = False) -> dict[str, Pruned]:
    removed = collect_garbage(database, settings, days * DAY_S, dry_run=dry_run)
    assert [problem for kind in removed for problem in kind.problems] == []
    return {kind.what: kind for kind in removed}


def rm(database: Database, settings: Settings, *, dry_run: bool = False, **targets: object) -> dict[str, Pruned]:
    removal = plan_removal(database, settings, **targets)  # type: ignore[arg-type]
    return {kind.what: kind for kind in carry_out(database, settings, removal, dry_run=dry_run)}


def age(folder: Path, days: float = 30) -> Path:
    then = time.time() - days * DAY_S
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))
    return folder


def unreferenced(settings: Settings, model: str, database: str | None) -> Path:
    return age(settings.storage / put_checkpoint(settings, model, database=database).published.path)


def recorded(database: Database) -> dict[str, bool]:
    """Which checkpoints are on record, and whether as gone."""
    with database.read() as session:
        return {row.path: row.gone_at is not None for row in checkpoints.all_checkpoints(session)}


def test_each_kind_is_listed_then_removed_and_what_is_used_stays(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/used")
    own = identity_of(database)
    lost = unreferenced(settings, "org/lost", own)
    young = settings.storage / put_checkpoint(settings, "org/young", database=own).published.path
    damaged = made.folders[0].with_name("bnb-nf4-0.rejected-1")
    shutil.copytree(made.folders[0], damaged)
    dead = stage(settings.staging_of(own) / "dead", made.job_ids[0], 1)
    (dead / "model.safetensors").write_bytes(b"half")
    age(dead.parent)
    outputs = settings.storage / "base-logits" / "r"
    outputs.mkdir(parents=True)
    (outputs / "reference.json").write_text("{}")
    age(outputs)
    log = settings.logs_of(own) / "j999-1.log"
    log.write_text("of a job that was removed")
    age(log)
    going = {"staging": dead, "unreferenced checkpoints": lost, "rejected checkpoints": damaged, "logs": log}
    going["base outputs"] = outputs
    for dry_run in (True, False):
        found = gc(database, settings, dry_run=dry_run)
        assert {what: found[what].number for what in going} == dict.fromkeys(going, 1), found
        assert sum(kind.size_bytes or 0 for kind in found.values()) > 2 * 700
        assert [path.exists() for path in going.values()] == [dry_run] * len(going)
    assert all(kind.number == 0 for kind in gc(database, settings).values()), "there is nothing left to do"
    assert (made.folders[0].is_dir(), young.is_dir()) == (True, True)
    assert recorded(database) == {made.paths[0]: False}


def test_what_a_living_worker_stages_and_an_attempt_that_runs_stay(database: Database, settings: Settings) -> None:
    own = identity_of(database)
    living = OwnStaging(settings.staging_of(own), "living", lease_s=60, renew_s=30).start()
    _, ids = a_batch(database)
    (token,) = claim(database, ids[:1], a_worker(database))
    kept = [stage(living.folder, 77, 1), stage(settings.staging_of(own) / "dead", *token)]
    age(kept[1].parent)
    assert gc(database, settings)["staging"].number == 0
    assert all(path.is_dir() for path in kept)
    living.close()


def test_nothing_goes_that_a_queued_or_running_job_needs(database: Database, settings: Settings) -> None:
    own = identity_of(database)
    made = a_measured_batch(database, settings, "org/a")
    lost = [unreferenced(settings, "org/b", own), unreferenced(settings, "org/c", own)]
    _, ids = a_batch(database, bundle("org/a", Method.NF4), bundle("org/b", Method.NF4), bundle("org/c", Method.NF4))
    set_key(database, ids[0], key_of("org/a"))
    (token,) = claim(database, [ids[1]], a_worker(database))
    set_key(database, token[0], key_of("org/b"))
    found = gc(database, settings)["unreferenced checkpoints"]
    # The key of the first is known to be a running job's; whether the other is needed, a worker is still to find out.
    assert found.kept == ((str(lost[1].relative_to(settings.storage)), f"j{ids[2]} is queued and may need it"),)
    assert rm(database, settings, paths=made.paths)["checkpoints"].kept == (
        (made.paths[0], f"j{ids[0]} is queued and needs it"),
    )
    assert all(folder.is_dir() for folder in (*lost, *made.folders))
    with database.write() as session:
        jobs.cancel(session, job_ids=ids)
    assert gc(database, settings)["unreferenced checkpoints"].number == 1, "that of no job"
    assert rm(database, settings, paths=made.paths)["checkpoints"].number == 1


def test_a_spooled_outcome_keeps_its_checkpoint(database: Database, settings: Settings) -> None:
    lost = unreferenced(settings, "org/lost", identity_of(database))
    settings.spool.mkdir(parents=True)
    outcome = settings.spool / "1-1.json"
    outcome.write_text(json.dumps({"outcome": "succeeded", "checkpoint": {"key": key_of("org/lost")}}))
    (settings.spool / "2-1.rejected").write_text("no JSON")
    assert (
        gc(database, settings)["unreferenced checkpoints"].kept[0][1] == "an outcome in this machine's spool is of it"
    )
    outcome.unlink()
    gc(database, settings)
    assert not lost.exists()


def test_what_another_database_made_or_uses_is_not_ours_to_remove(database: Database, settings: Settings) -> None:
    own = identity_of(database)
    theirs = unreferenced(settings, "org/theirs", OTHER)
    unsaid = unreferenced(settings, "org/of-an-older-version", None)
    broken = age(shutil.copytree(theirs, theirs.with_name("bnb-nf4-0.rejected-1")))
    staged = age(stage(settings.staging_of(OTHER) / "w", 1, 1).parent)
    made = a_measured_batch(database, settings, "org/shared")
    with database.read() as session:
        key = session.scalars(select(Checkpoint.key)).one()
    assert find_published(settings.storage, made.paths[0], key, database=OTHER) is not None
    gc(database, settings)
    assert rm(database, settings, paths=made.paths)["checkpoints"].kept == (
        (made.paths[0], f"the database {OTHER} on this storage uses it too"),
    )
    assert all(folder.is_dir() for folder in (theirs, unsaid, broken, staged, made.folders[0]))
    kinds = {Path(one.path).parent.name: one.kind for one in find_holdings(database, settings) if "nf4" in one.path}
    assert kinds["of-an-older-version"] == kinds["theirs"] or HoldingKind.UNKNOWN in kinds.values()
    assert find_published(settings.storage, made.paths[0], key, database=own) is not None
    assert not (settings.storage / ".adopted" / own).exists(), "nobody marks what is their own"


def test_a_mark_goes_when_no_job_is_left_that_used_the_checkpoint(database: Database, settings: Settings) -> None:
    """Its maker could never remove it."""
    own = identity_of(database)
    _, ids = a_batch(database, bundle("org/theirs", Method.NF4), bundle("org/deleted", Method.NF4))
    marks, paths = {}, {}
    for job_id, model in zip(ids, ("org/theirs", "org/deleted"), strict=True):
        paths[model] = path = put_checkpoint(settings, model, database=OTHER).published.path
        set_key(database, job_id, key_of(model))
        assert find_published(settings.storage, path, key_of(model), database=own) is not None
        marks[model] = age(settings.storage / ".adopted" / own / path)
    shutil.rmtree(settings.storage / "checkpoints" / "deleted")
    gc(database, settings)
    assert [mark.exists() for mark in marks.values()] == [True, False]
    set_key(database, ids[0], "of another source")
    young = gc(database, settings, days=60)
    assert (young["marks on checkpoints of other databases"].number, marks["org/theirs"].exists()) == (0, True)
    assert gc(database, settings, dry_run=True)["marks on checkpoints of other databases"].number == 1
    gc(database, settings)
    assert not marks["org/theirs"].exists()
    assert why_not_ours(settings.storage, paths["org/theirs"], OTHER) is None


def test_what_lies_behind_a_broken_link_is_neither_gone_nor_made_anew(database: Database, settings: Settings) -> None:
    """As where a model's folder was moved to a disk that is not mounted."""
    made = a_measured_batch(database, settings, "org/far")
    folder, disk = made.folders[0].parent, settings.storage.parent / "disk"
    folder.rename(disk)
    folder.symlink_to(disk)
    away = disk.rename(disk.with_name("unmounted"))
    assert gc(database, settings)["missing checkpoints, recorded"].number == 0
    assert recorded(database) == {made.paths[0]: False}
    with pytest.raises(StorageError, match=r"is a link to .*disk, which is not there: mount it"):
        find_published(settings.storage, made.paths[0], key_of("org/far"))
    (link,) = [one for one in find_holdings(database, settings) if one.kind is HoldingKind.OTHER]
    assert (link.model, link.note) == ("far", f"a link to {disk}, which is not there")
    away.rename(disk)
    assert find_published(settings.storage, made.paths[0], key_of("org/far")) is not None
    assert gc(database, settings)["missing checkpoints, recorded"].number == 0


def test_a_checkpoint_of_an_unnamed_database_goes_where_there_is_no_other(
    database: Database, settings: Settings
) -> None:
    unsaid = unreferenced(settings, "org/of-an-older-version", None)
    assert gc(database, settings)["unreferenced checkpoints"].number == 1
    assert not unsaid.exists()


def test_what_a_killed_removal_left_is_finished(database: Database, settings: Settings) -> None:
    """Killed after it was moved aside, and before its record was changed."""
    made = a_measured_batch(database, settings, "org/a")
    own = identity_of(database)
    half = aside_of(made.folders[0], own)
    made.folders[0].rename(half)
    of_another = aside_of(made.folders[0], OTHER)
    shutil.copytree(half, of_another)
    assert gc(database, settings)["half-removed checkpoints"].number == 1
    assert (half.exists(), of_another.exists()) == (False, True), "that one may still be moved back"
    assert recorded(database) == {made.paths[0]: True}


def test_a_removed_batch_goes_with_its_rows_logs_and_checkpoints(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a", Method.NF4, Method.INT8)
    other = a_measured_batch(database, settings, "org/b")
    dry = rm(database, settings, batch_ids=[made.batch_id], dry_run=True)
    done = rm(database, settings, batch_ids=[made.batch_id])
    for found in (dry, done):
        numbers = {what: kind.number for what, kind in found.items()}
        assert numbers == {"batches": 1, "jobs": 2, "checkpoints": 2, "logs": 2}
    assert not any(folder.exists() for folder in made.folders)
    assert recorded(database) == {other.paths[0]: False}
    with database.read() as session:
        assert [batch.id for batch in session.scalars(select(Batch))] == [other.batch_id]
        assert len(session.scalars(select(Result)).all()) == 1
    assert [path.name for path in settings.logs_of(identity_of(database)).iterdir()] == [f"j{other.job_ids[0]}-1.log"]


def test_a_job_is_removed_without_its_batch(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a", Method.NF4, Method.INT8)
    assert rm(database, settings, job_ids=made.job_ids[:1])["checkpoints"].paths == (made.paths[0],)
    assert sorted(states(database)) == made.job_ids[1:]
    assert recorded(database) == {made.paths[1]: False}


def test_the_log_of_a_runner_stays_while_a_job_of_its_bundle_does(database: Database, settings: Settings) -> None:
    """It is named after the first of them."""
    made = a_measured_batch(database, settings, "org/a", Method.NF4, Method.INT8)
    logs = settings.logs_of(identity_of(database))
    shared = runner_log(logs, made.job_ids[0], 1)
    shared.write_text("printed by libraries")
    assert rm(database, settings, job_ids=made.job_ids[:1])["logs"].number == 1
    assert shared.exists()
    assert rm(database, settings, batch_ids=[made.batch_id])["logs"].number == 1
    assert shared.exists(), "gc removes it when it is old"
    gc(database, settings, days=-1)
    assert not shared.exists()


def test_what_has_not_ended_is_refused(database: Database, settings: Settings) -> None:
    batch_id, ids = a_batch(database)
    claim(database, ids[:1], a_worker(database))
    with pytest.raises(UsageError, match=rf"b{batch_id}: 1 running and 2 queued \(`qbatch cancel b{batch_id}` first\)"):
        plan_removal(database, settings, batch_ids=[batch_id])
    with pytest.raises(UsageError, match=f"`qbatch cancel j{ids[1]}` first"):
        plan_removal(database, settings, job_ids=ids[1:2])
    assert sorted(states(database)) == ids


def test_what_other_jobs_refer_to_stays(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a", Method.NF4, Method.INT8)
    batch_id, ids = a_batch(database, bundle("org/a", Method.NF4, Method.INT8))
    for job_id, method in zip(ids, (Method.NF4, Method.INT8), strict=True):
        set_key(database, job_id, key_of("org/a", method))
    first, second = sorted(claim(database, ids, a_worker(database)))
    with database.write() as session:
        assert jobs.answer(session, second, made.job_ids[1])
        jobs.cancel(session, job_ids=[first[0]])
    removal = plan_removal(database, settings, batch_ids=[made.batch_id])
    assert removal.remarks == [f"j{made.job_ids[1]} stays, because its result answers j{ids[1]}"]
    done = rm(database, settings, batch_ids=[made.batch_id])
    assert (done["batches"].number, done["jobs"].number) == (0, 1)
    assert done["checkpoints"].kept == ((made.paths[0], f"j{ids[0]} has it too"),)
    assert sorted(states(database)) == [made.job_ids[1], *ids]
    rm(database, settings, batch_ids=[made.batch_id, batch_id])
    assert states(database) == {}
    assert recorded(database) == {}


def test_a_removed_checkpoint_leaves_its_result_without_a_path(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a")
    with pytest.raises(UsageError, match="not a checkpoint that this database has on record"):
        plan_removal(database, settings, paths=["checkpoints/a/b"])
    assert rm(database, settings, paths=made.paths)["checkpoints"].number == 1
    assert not made.folders[0].exists()
    with database.read() as session:
        (row,) = find_results(session)
        (record,) = job_records(session, made.job_ids)
        assert checkpoints.paths(session, [key_of("org/a")]) == {}, "nobody waits for it"
    assert (row.state, row.checkpoint_path) == ("succeeded", None)
    assert record.checkpoint is not None
    assert record.checkpoint.gone_at is not None
    with database.write() as session:
        checkpoints.record(
            session, key=key_of("org/a"), path=made.paths[0], root_sha256="r", disk_bytes=1, job_id=made.job_ids[0]
        )
    with database.read() as session:
        assert find_results(session)[0].checkpoint_path == made.paths[0], "it was made again"


def test_what_the_storage_holds_is_said_by_batch_model_and_scheme(database: Database, settings: Settings) -> None:
    own = identity_of(database)
    made = a_measured_batch(database, settings, "org/a", Method.NF4, Method.INT8)
    unreferenced(settings, "org/lost", own)
    unreferenced(settings, "org/theirs", OTHER)
    (settings.storage / "notes.txt").write_text("somebody's")
    found = find_holdings(database, settings)
    assert {one.kind for one in found} == {
        HoldingKind.CHECKPOINT, HoldingKind.UNREFERENCED, HoldingKind.UNKNOWN, HoldingKind.LOGS, HoldingKind.OTHER,
        HoldingKind.STAGING,
    }  # fmt: skip
    listed = {one.path: (one.model, one.scheme, one.batch_ids) for one in found}
    assert listed[made.paths[1]] == ("org/a", "bnb-int8", (made.batch_id,))
    on_disk = sum(path.lstat().st_size for path in settings.storage.rglob("*") if path.is_file())
    assert sum(one.size_bytes for one in found) == on_disk
    with database.read() as session:
        assert len(session.scalars(select(Job)).all()) == 2


def test_what_a_submit_holds_stays_and_nobody_waits_for_it(postgresql_database: Database, settings: Settings) -> None:
    """Two that waited for each other ended one of them, which was the submit if it was long."""
    worker = a_worker(postgresql_database)
    _, ids = a_batch(postgresql_database, bundle("org/a", Method.NONE), bundle("org/b", Method.NONE))
    for token in claim(postgresql_database, ids, worker):
        succeed(postgresql_database, token)
    removal = plan_removal(postgresql_database, settings, job_ids=ids)
    with postgresql_database.write() as submit:
        assert finished_results.keep(submit, ids[:1]) == {ids[0]}
        done = {kind.what: kind for kind in carry_out(postgresql_database, settings, removal, dry_run=False)}
    assert done["jobs"].number == 1
    assert done["jobs"].kept == ((f"j{ids[0]}", "another command is using it: remove it again"),)


def test_a_batch_goes_with_the_last_of_its_jobs(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a")
    first, *others = made.job_ids
    assert rm(database, settings, job_ids=others)["batches"].number == 0
    assert rm(database, settings, job_ids=[first])["batches"].number == 1
    with database.read() as session:
        assert session.get(Batch, made.batch_id) is None


@pytest.mark.parametrize("model", ["/data/模型", "/data/llama"])
def test_whatever_its_name_a_model_that_waits_may_need_its_checkpoint(database: Database, model: str) -> None:
    """A folder's name has ASCII letters and digits only."""
    _, (job_id,) = a_batch(database, bundle(model, Method.NF4))
    with database.read() as session:
        why = why_needed(session, "ab" * 32, name=slug(model), method=Method.NF4)
    assert why == f"j{job_id} is queued and may need it"


def _finished_elsewhere(database: Database, made: Made) -> int:
    """A job of another batch that the first job of ``made`` answers."""
    _, ids = a_batch(database, bundle("org/copy", Method.NF4))
    (token,) = claim(database, ids, a_worker(database, name="another"))
    with database.write() as session:
        key = session.get_one(Job, made.job_ids[0]).checkpoint_key
        jobs.note(session, token, checkpoint_key=key)
        assert jobs.answer(session, token, made.job_ids[0])
    return ids[0]


def test_what_a_job_came_to_have_after_the_batch_was_looked_at_stays(database: Database, settings: Settings) -> None:
    made = a_measured_batch(database, settings, "org/a")
    removal = plan_removal(database, settings, batch_ids=[made.batch_id])
    other = _finished_elsewhere(database, made)
    done = {kind.what: kind for kind in carry_out(database, settings, removal, dry_run=False)}
    assert done["checkpoints"].kept == ((made.paths[0], f"j{other} has it too"),)
    assert made.folders[0].is_dir()
    assert recorded(database) == {made.paths[0]: False}


def test_what_a_job_came_to_have_after_gc_looked_stays(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = unreferenced(settings, "org/a", identity_of(database))
    path = str(lost.relative_to(settings.storage))

    def found_and_measured(database: Database, settings: Settings) -> list[Holding]:
        holdings = find_holdings(database, settings)
        _, ids = a_batch(database, bundle("org/a", Method.NF4))
        (token,) = claim(database, ids, a_worker(database))
        set_key(database, ids[0], key_of("org/a"))
        with database.write() as session:
            checkpoints.record(session, key=key_of("org/a"), path=path, root_sha256="r", disk_bytes=1, job_id=ids[0])
            assert jobs.succeed(
                session,
                token,
                measured(),
                protocol=PROTOCOL.for_device(DeviceKind.CPU),
                checkpoint_path=path,
            )
        return holdings

    monkeypatch.setattr(garbage, "find_holdings", found_and_measured)
    assert gc(database, settings)["unreferenced checkpoints"].number == 0
    assert lost.is_dir()
    assert recorded(database) == {path: False}


def test_what_was_moved_aside_is_moved_back_where_the_second_look_fails(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = a_measured_batch(database, settings, "org/a")

    def failing(storage: Path, path: str, own: str, *, folder: Path | None = None) -> str | None:
        if folder is not None:
            raise OSError(errno.ESTALE, "Stale file handle", str(storage))
        return why_not_ours(storage, path, own)

    monkeypatch.setattr(checkpoint_remover, "why_not_ours", failing)
    assert "Stale file handle" in rm(database, settings, paths=made.paths)["checkpoints"].problems[0]
    assert made.folders[0].is_dir()
    assert recorded(database) == {made.paths[0]: False}


def test_gc_waits_for_a_removal_that_may_still_move_back(database: Database, settings: Settings) -> None:
    """While one process has a checkpoint moved aside and looks again, another one's gc must not finish that."""
    made = a_measured_batch(database, settings, "org/a")
    _, ids = a_batch(database, bundle("org/b", Method.NF4))
    claim(database, ids, a_worker(database))
    taker = remover(database, settings)
    collected: list[Pruned] = []
    collecting = threading.Thread(
        target=lambda: collected.extend(collect_garbage(database, settings, DAY_S, dry_run=False))
    )
    looks = iter((None, "j2 is running and needs it"))

    def look(*_: object, **__: object) -> str | None:
        why = next(looks)
        if why is not None:
            collecting.start()
            collecting.join(1.0)
        return why

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointRemover, "_why_kept", look)
        one = StoredCheckpoint(path=made.paths[0], key=key_of("org/a"), method=Method.NF4)
        assert taker.remove(one) == "j2 is running and needs it"
    collecting.join()
    assert made.folders[0].is_dir()
    assert [kind.problems for kind in collected if kind.problems] == []


def test_a_link_to_a_checkpoint_goes_and_what_it_leads_to_stays(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    made = a_measured_batch(database, settings, "org/a")
    elsewhere = tmp_path / "larger disk"
    made.folders[0].rename(elsewhere)
    made.folders[0].symlink_to(elsewhere)
    done = rm(database, settings, paths=made.paths)["checkpoints"]
    assert (done.number, done.problems) == (1, ())
    assert list(made.folders[0].parent.iterdir()) == []
    assert (elsewhere / "model.safetensors").is_file()
    damaged = made.folders[0].with_name("bnb-nf4-0.rejected-1")
    damaged.symlink_to(elsewhere)
    aside_of(made.folders[0], identity_of(database)).symlink_to(elsewhere)
    gc(database, settings)
    assert list(made.folders[0].parent.iterdir()) == []
    assert (elsewhere / "model.safetensors").is_file()


def test_rows_stay_where_the_checkpoints_are_not_to_be_seen(database: Database, settings: Settings) -> None:
    """The mount point is there, and nothing is mounted."""
    made = a_measured_batch(database, settings, "org/a")
    settings.storage.rename(settings.storage.with_name("away"))
    settings.storage.mkdir()
    done = rm(database, settings, batch_ids=[made.batch_id])
    assert len(done["checkpoints"].problems) == 1
    assert sorted(states(database)) == made.job_ids
    assert recorded(database) == {made.paths[0]: False}


def test_a_result_whose_checkpoint_was_just_removed_answers_nobody(database: Database, settings: Settings) -> None:
    """It was found to be there before the transaction that ends the other job."""
    gone, there = a_measured_batch(database, settings, "org/a"), a_measured_batch(database, settings, "org/b")
    rm(database, settings, paths=gone.paths)
    with database.write() as session:
        assert finished_results.keep(session, {*gone.job_ids, *there.job_ids, 999}) == set(there.job_ids)


def test_a_worker_does_not_wait_for_who_is_about_to_answer(postgresql_database: Database, settings: Settings) -> None:
    """A submit answers in one transaction as long as it takes, and meanwhile no lease is renewed by one that waits."""
    made = a_measured_batch(postgresql_database, settings, "org/a")
    (path,) = made.paths
    with postgresql_database.read() as session:
        key = checkpoints.checkpoints_at(session, [path])[0].key
    with postgresql_database.write() as answering:
        assert finished_results.keep(answering, set(made.job_ids)) == set(made.job_ids)
        with postgresql_database.write() as session:
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            checkpoints.verified_again(session, path, {"model.safetensors": "seen"})
            checkpoints.record(session, key=key, path=path, root_sha256="0" * 64, disk_bytes=1, job_id=made.job_ids[0])


def test_who_is_about_to_answer_waits_for_the_removal(postgresql_database: Database, settings: Settings) -> None:
    made = a_measured_batch(postgresql_database, settings, "org/a")
    kept: list[set[int]] = []

    def answer() -> None:
        with postgresql_database.write() as session:
            kept.append(finished_results.keep(session, set(made.job_ids)))

    answering = threading.Thread(target=answer)
    with postgresql_database.write() as session:
        checkpoints.checkpoints_at(session, made.paths, lock=True)
        answering.start()
        answering.join(0.5)
        checkpoints.take_out(session, made.paths[0])
    answering.join()
    assert kept == [set()]

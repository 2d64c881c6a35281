"""A checkpoint that somebody removed by hand is not listed, is recorded as gone, and is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import event
from sqlalchemy.orm import Session

from qbatch.cli import main
from qbatch.core.domain import Method
from qbatch.core.settings import Settings
from qbatch.core.storage import CHECKPOINTS
from qbatch.models_db import jobs
from qbatch.models_db.checkpoints import checkpoints_at
from qbatch.models_db.finished_results import find_finished
from qbatch.models_db.gone_checkpoints import note_missing
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Checkpoint
from qbatch.models_db.tables import Result as ResultOfJob
from tests.rows import a_batch, a_worker, bundle, claim
from tests.stored_checkpoints import Made, a_measured_batch, key_of, set_key


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Where ``sqlite_database`` is."""
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    monkeypatch.delenv("QBATCH_STORAGE", raising=False)
    return Settings.from_env({"QBATCH_HOME": str(tmp_path)})


@pytest.fixture
def made(sqlite_database: Database, settings: Settings) -> Made:
    return a_measured_batch(sqlite_database, settings, "org/a")


def qbatch(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def test_no_path_is_given_to_what_is_not_there(made: Made) -> None:
    for command in (["results"], ["show", f"b{made.batch_id}"]):
        assert json.loads(qbatch(*command, "--json").stdout)[0]["checkpoint_path"] == str(made.folders[0])
    shutil.rmtree(made.folders[0])
    for command in (["results"], ["show", f"b{made.batch_id}"]):
        assert json.loads(qbatch(*command, "--json").stdout)[0]["checkpoint_path"] is None
    assert made.paths[0] not in qbatch("compare", "--json").stdout
    assert "its checkpoint is no longer on the storage; a new submit makes it again" in qbatch("compare").stdout
    assert "no longer on the storage; a new submit makes it again" in qbatch("show", "j1").stdout


def test_verify_takes_a_job_as_it_takes_its_batch(made: Made) -> None:
    def verified(*words: str) -> list[str]:
        return [row["checkpoint"] for row in json.loads(qbatch("verify", *words, "--json", code=1).stdout)]

    of_batch = verified(f"b{made.batch_id}")
    assert verified("j1") == of_batch[:1]
    assert verified("j1", f"b{made.batch_id}") == of_batch


def test_verify_fails_once_and_notices_when_it_is_back(made: Made, tmp_path: Path) -> None:
    shutil.move(made.folders[0], tmp_path / "elsewhere")
    done = qbatch("verify", "--json", code=1)
    assert [row["state"] for row in json.loads(done.stdout)] == ["gone"]
    assert "was removed: that is recorded now" in done.stderr
    assert "no such folder" not in done.stderr, "it is said once"
    assert "--force" not in done.stderr
    assert json.loads(qbatch("verify", "--json").stdout) == []
    assert "j1: no checkpoint is recorded that is still there" in qbatch("verify", "j1").stderr
    assert "no longer on the storage (noted" in qbatch("show", "j1").stdout
    shutil.move(tmp_path / "elsewhere", made.folders[0])
    # That its files are no real model's, only reading them tells.
    assert json.loads(qbatch("verify", "--json", code=1).stdout)[0]["state"] == "damaged"
    assert json.loads(qbatch("gc", "--json").stdout)[2]["number"] == 0, "it is not taken for one that nobody knows"
    assert made.paths[0] in qbatch("results", "--json").stdout


def test_nothing_is_noted_where_the_storage_is_not_mounted(made: Made, settings: Settings, tmp_path: Path) -> None:
    settings.checkpoints.rename(tmp_path / "unmounted")
    qbatch("verify", code=1)
    qbatch("gc", "--yes")
    assert made.paths[0] in qbatch("results", "--json").stdout
    (tmp_path / "unmounted").rename(settings.checkpoints)
    assert made.paths[0] in qbatch("results", "--json").stdout


def test_a_gone_checkpoint_answers_nobody(made: Made, sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        pair = (key_of("org/a"), session.get_one(ResultOfJob, made.job_ids[0]).protocol_hash)
        assert find_finished(session, {pair}, device_names=None).keys() == {pair}
    shutil.rmtree(made.folders[0])
    assert "recorded" not in qbatch("gc").stderr
    qbatch("gc", "--yes")
    with sqlite_database.read() as session:
        assert find_finished(session, {pair}, device_names=None) == {}


def test_what_is_named_is_listed_and_with_yes_removed(made: Made) -> None:
    dry = qbatch("rm", str(made.folders[0]))
    assert "nothing was removed: with --yes" in dry.stderr
    assert f"  {made.paths[0]}\n" in dry.stdout
    assert "nothing was removed" not in qbatch("gc").stderr
    assert made.folders[0].is_dir()
    assert json.loads(qbatch("rm", made.paths[0], "--yes", "--json").stdout)[2]["paths"] == made.paths
    assert not made.folders[0].exists()
    assert "not a checkpoint in" in qbatch("rm", "/etc/passwd", code=2).stderr
    assert json.loads(qbatch("du", "--by", "batch", "--json").stdout)[0]["kind"] == "staging"
    qbatch("rm", "b1", "--yes")
    assert json.loads(qbatch("results", "--json").stdout) == []


def test_of_each_model_what_is_recommended_is_kept(sqlite_database: Database, settings: Settings) -> None:
    first, second = (
        a_measured_batch(sqlite_database, settings, model, Method.NF4, Method.INT8) for model in ("org/a", "org/b")
    )
    dry = qbatch("keep", "--recommended", "b1")
    assert f"  {first.paths[1]}\n" in dry.stdout
    assert "org/a: bnb-nf4 (j1) is recommended" in dry.stderr
    assert "nothing was removed" in dry.stderr
    for options, kept in ((["b1"], 0), (["b2", "--max-kl", "0.005"], 1)):
        made = (first, second)[options[0] == "b2"]
        listed = json.loads(qbatch("keep", "--recommended", *options, "--yes", "--json").stdout)
        assert [one["paths"] for one in listed] == [made.paths[1 - kept : 2 - kept]]
        assert [folder.is_dir() for folder in made.folders] == [kept == 0, kept == 1]
    assert "nothing is recommended, so all of it is kept" in qbatch("keep", "--recommended", "--max-kl", "0").stderr
    assert len(json.loads(qbatch("results", "--json").stdout)) == 4


def test_what_a_batch_that_is_not_named_has_too_is_kept(sqlite_database: Database, settings: Settings) -> None:
    """Of one batch NF4 is recommended. In the other one, only INT8 was asked for, and answered by the first."""
    made = a_measured_batch(sqlite_database, settings, "org/a", Method.NF4, Method.INT8)
    _, ids = a_batch(sqlite_database, bundle("org/a", Method.INT8))
    set_key(sqlite_database, ids[0], key_of("org/a", Method.INT8))
    (token,) = claim(sqlite_database, ids, a_worker(sqlite_database))
    with sqlite_database.write() as session:
        assert jobs.answer(session, token, made.job_ids[1])
    (listed,) = json.loads(qbatch("keep", "--recommended", "b1", "--yes", "--json").stdout)
    assert listed["kept"] == [{"path": made.paths[1], "why": f"j{ids[0]} has it too"}]
    assert all(folder.is_dir() for folder in made.folders)
    (listed,) = json.loads(qbatch("keep", "--recommended", "--yes", "--json").stdout)
    assert listed["paths"] == [made.paths[1]]


def recorded(database: Database, storage: Path, count: int) -> set[str]:
    """Checkpoints on record, of which the storage has nothing."""
    (storage / CHECKPOINTS).mkdir(parents=True)
    paths = {f"{CHECKPOINTS}/m{number}/nf4" for number in range(count)}
    with database.write() as session:
        for path in sorted(paths):
            session.add(Checkpoint(key=path, path=path, root_sha256="", disk_bytes=1))
    return paths


def test_what_a_submit_holds_is_noted_the_next_time(postgresql_database: Database, tmp_path: Path) -> None:
    """The leading scheduler would wait for the end of the submit, and send nothing meanwhile."""
    (path,) = recorded(postgresql_database, tmp_path, 1)
    submitting = Database(postgresql_database.engine.url.render_as_string(hide_password=False))
    with submitting.write() as session:
        assert len(checkpoints_at(session, [path], lock=True)) == 1
        assert note_missing(postgresql_database, tmp_path) == set()
    submitting.dispose()
    assert note_missing(postgresql_database, tmp_path) == {path}


def test_others_may_write_while_many_are_noted(sqlite_database: Database, tmp_path: Path) -> None:
    paths = recorded(sqlite_database, tmp_path / "storage", 50)
    commits: list[Session] = []

    def note(session: Session) -> None:
        commits.append(session)

    event.listen(Session, "before_commit", note)
    try:
        assert note_missing(sqlite_database, tmp_path / "storage") == paths
    finally:
        event.remove(Session, "before_commit", note)
    assert len(commits) >= 3

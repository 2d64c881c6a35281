"""Batches by id, by name or as ``latest``, and jobs by id, on the command line of every command that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from sqlalchemy import update

from qbatch.cli import main
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Batch
from tests import tiny
from tests.rows import a_batch, bundle


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``sqlite_database`` is."""
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def batches(sqlite_database: Database) -> Database:
    """Three batches of three jobs, the first called nightly, and the second and the third both twice."""
    for number, name in enumerate(("nightly", "twice", "twice"), start=1):
        batch_id, _ = a_batch(sqlite_database, bundle(f"/models/m{number}"))
        with sqlite_database.write() as session:
            session.execute(update(Batch).where(Batch.id == batch_id).values(name=name))
    return sqlite_database


def qbatch(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def models_of(*args: str) -> set[str]:
    return {row["model"] for row in json.loads(qbatch(*args, "--json").stdout)}


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("command", ["jobs", "results", "show"])
def test_a_batch_is_meant_by_its_id_its_name_or_its_age(command: str) -> None:
    assert models_of(command, "b2") == {"/models/m2"}
    assert models_of(command, "nightly") == {"/models/m1"}
    assert models_of(command, "latest") == {"/models/m3"}
    assert models_of(command, "latest", "b1", "nightly") == {"/models/m1", "/models/m3"}


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("command", ["jobs", "results"])
def test_the_option_means_what_the_argument_means(command: str) -> None:
    assert models_of(command, "--batch", "nightly") == {"/models/m1"}
    assert models_of(command, "b2", "--batch", "nightly", "--batch", "b2") == {"/models/m1", "/models/m2"}
    assert models_of(command) == {"/models/m1", "/models/m2", "/models/m3"}


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("b9", "no such batch: b9"),
        ("weekly", "no such batch: 'weekly' (use an id such as b12, the name of a batch, or latest)"),
        ("twice", "2 batches have the name 'twice': use an id (b2, b3)"),
        ("j1", "j1 is a job id; this command takes batches"),
    ],
)
@pytest.mark.parametrize("command", ["status", "jobs", "wait", "results", "compare", "watch"])
def test_what_means_no_batch_is_refused_in_one_line(command: str, word: str, says: str) -> None:
    assert says in qbatch(command, word, code=2).stderr


@pytest.mark.usefixtures("sqlite_database")
def test_without_batches_none_is_the_latest() -> None:
    assert "there is no batch yet" in qbatch("wait", "latest", code=2).stderr
    for command in ("status", "results", "compare"):
        assert "there is no batch yet: `qbatch submit MODEL` stores one" in qbatch(command).stderr


@pytest.mark.usefixtures("batches")
def test_ids_alone_are_what_other_commands_take() -> None:
    assert qbatch("status", "-q").stdout.split() == ["b1", "b2", "b3"]
    assert qbatch("jobs", "nightly", "-q").stdout.split() == ["j1", "j2", "j3"]
    assert qbatch("results", "nightly", "-q").stdout.split() == ["j1", "j2", "j3"]
    assert qbatch("cancel", "nightly", "j4").stdout.split() == ["j1", "j2", "j3", "j4"]
    cancelled = qbatch("jobs", "-q", "--state", "cancelled").stdout.split()
    assert cancelled == ["j1", "j2", "j3", "j4"]
    assert qbatch("retry", *cancelled).stdout.split() == cancelled
    assert qbatch("jobs", "-q", "--state", "cancelled").stdout == ""


@pytest.mark.usefixtures("batches")
def test_a_change_of_no_job_says_why() -> None:
    assert "0 jobs queued again: none had failed or been cancelled\n" in qbatch("retry", "nightly").stderr
    assert qbatch("cancel", "nightly").stderr == "3 jobs cancelled\n"
    assert qbatch("cancel", "nightly").stderr == "0 jobs cancelled: all had ended\n"


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("words", [["b1"], ["b1", "b2", "b3"]], ids=["one", "three"])
def test_diff_takes_two_batches(words: list[str]) -> None:
    said = qbatch("diff", *words, code=2).stderr
    assert f"diff compares two batches, not {len(words)}: `qbatch diff b11 b12`" in said


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize(
    ("word", "says"),
    [("j99", "no such job: j99"), ("J1", "no such batch or job: 'J1' (use an id such as b12 or j345, ")],
)
def test_what_means_nothing_changes_nothing(word: str, says: str) -> None:
    assert says in qbatch("cancel", "nightly", word, code=2).stderr
    assert qbatch("jobs", "-q", "--state", "cancelled").stdout == ""


@pytest.mark.usefixtures("sqlite_database")
def test_a_model_is_named_on_the_command_line(tmp_path: Path) -> None:
    folder = tiny.make_causal(tmp_path / "m")
    listed = tmp_path / "list.txt"
    listed.write_text("org/listed\n")
    asked = ("submit", str(folder), "org/named@v1", "--models", str(listed), "--bits", "4", "--no-baseline", "-q")
    assert qbatch(*asked).stdout == "b1\n"
    assert models_of("jobs", "b1") == {str(folder), "org/named", "org/listed"}
    assert "no models: name some" in qbatch("submit", "--bits", "4", code=2).stderr
    assert "no such folder: ./gone" in qbatch("submit", "./gone", "--bits", "4", code=2).stderr
    for name, says in (("org/model", "there is no file org/model"), (str(folder), "is a folder")):
        refusal = qbatch("submit", "--models", name, "--bits", "4", code=2).stderr
        assert says in refusal
        assert f"qbatch submit {name}" in refusal


@pytest.mark.usefixtures("sqlite_database")
@pytest.mark.parametrize("name", ["latest", "b3", "j3"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    assert "use another name" in qbatch("submit", "org/a", "--bits", "4", "--name", name, code=2).stderr


@pytest.mark.usefixtures("batches")
def test_a_command_runs_when_all_has_ended(tmp_path: Path) -> None:
    qbatch("cancel", "b1", "b2")
    told = tmp_path / "told"
    command = f'echo "$BATCHES: $SUCCEEDED $FAILED $CANCELLED" > {told}; exit 3'
    said = qbatch("wait", "b1", "b2", "--on-end", command, code=1).stderr
    assert told.read_text() == "b1 b2: 0 0 6\n"
    assert "the command of --on-end ended with exit code 3" in said
    refusal = qbatch("submit", "org/a", "--bits", "4", "--on-end", "true", code=2).stderr
    assert "--on-end needs --wait" in refusal


def completions(args: list[str], incomplete: str) -> list[str]:
    shell = ShellComplete(main, {}, "qbatch", "_QBATCH_COMPLETE")
    return [item.value for item in shell.get_completions(args, incomplete)]


@pytest.mark.usefixtures("batches")
def test_a_shell_completes_commands_batches_models_and_columns() -> None:
    assert completions([], "res") == ["results"]
    assert completions(["status"], "") == ["latest", "b3", "b2", "b1", "nightly", "twice"]
    assert completions(["cancel"], "n") == ["nightly"]
    assert completions(["results", "--batch"], "b") == ["b3", "b2", "b1"]
    assert completions(["results", "--model"], "m2") == ["/models/m2"]
    assert completions(["results", "--sort"], "kl_m") == ["kl_mean"]
    assert completions(["results", "--columns"], "weights,peak") == ["weights,peak-memory"]


@pytest.mark.usefixtures("batches")
def test_a_shell_completes_jobs_schemes_and_loaders() -> None:
    assert completions(["logs"], "") == [f"j{number}" for number in range(9, 0, -1)]
    shown = {item.help for item in ShellComplete(main, {}, "qbatch", "_QBATCH_COMPLETE").get_completions(["logs"], "")}
    assert {"/models/m1 baseline", "/models/m3 bnb-nf4"} <= shown
    for command in ("show", "cancel", "retry", "card", "rm", "verify"):
        assert completions([command], "j9") == ["j9"]
        assert completions([command], "")[:2] == ["latest", "b3"], "there are too many jobs for a list of everything"
    assert completions(["submit", "m", "--scheme"], "bnb-nf4,bnb-i") == ["bnb-nf4,bnb-int8"]
    assert completions(["results", "--scheme"], "non") == ["none"]
    assert completions(["submit", "m", "--scheme"], "au") == ["auto"]
    assert completions(["submit", "m", "--measure"], "size,qu") == ["size,quality"]
    assert completions(["verify", "--for"], "peft,vl") == ["peft,vllm"]


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize(
    "args",
    [
        *(["submit"], ["run", "one"], ["plan"], ["submit", "--models"], ["inspect"], ["submit", "m", "--eval-text"]),
        *(["verify"], ["rm"], ["submit", "m", "--tasks"], ["report", "-o"]),
    ],
)
def test_a_shell_completes_files_where_files_are_meant(args: list[str]) -> None:
    shell = ShellComplete(main, {}, "qbatch", "_QBATCH_COMPLETE")
    (item,) = shell.get_completions(args, "models/")
    assert (item.value, item.type) == ("models/", "dir" if args[0] in ("verify", "rm") else "file")


def test_a_shell_that_completes_makes_no_database(home: Path) -> None:
    assert completions(["status"], "") == []
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("sqlite_database")
@pytest.mark.parametrize(("command", "hint"), [("status", "qbatch submit MODEL"), ("workers", "qbatch up")])
def test_where_there_is_nothing_yet_the_next_step_is_said(command: str, hint: str) -> None:
    assert hint in qbatch(command).stderr
    assert json.loads(qbatch(command, "--json").stdout) == []

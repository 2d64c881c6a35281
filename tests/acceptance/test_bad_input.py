"""Bad input gets one clear line and an exit code, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qbatch.models_db.session import Database
from tests import tiny
from tests.acceptance.conftest import Qbatch
from tests.unprivileged import without_rights


def one_line(done: object) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]  # type: ignore[attr-defined]
    assert len(lines) == 1, lines
    return str(lines[0])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no models: name some"),
        (["# nothing", ""], "no models: name some"),
        (["./no/such/folder"], "line 1: no such folder: ./no/such/folder"),
        (["org/name@../x"], "line 1"),
        (["what is this?"], "neither a folder nor a hub id"),
    ],
)
def test_a_list_that_cannot_be_used(
    qbatch: Qbatch, model_list: Callable[..., str], lines: list[str], says: str
) -> None:
    assert says in one_line(qbatch("submit", "--models", model_list(*lines), "--bits", "4", code=2))
    assert qbatch.json("status") == []


def test_a_missing_list_and_unknown_bits(qbatch: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    assert "there is no file /no/list" in one_line(qbatch("submit", "--models", "/no/list", "--bits", "4", code=2))
    listed = model_list(models / "llama")
    assert "5 is not a supported bit width" in one_line(qbatch("submit", "--models", listed, "--bits", "5", code=2))
    assert "int4" in one_line(qbatch("submit", "--models", listed, "--bits", "4", "--quant-type", "int4", code=2))
    assert "4-bit" in one_line(qbatch("submit", "--models", listed, "--bits", "8", "--double-quant", code=2))
    qbatch("submit", "--models", listed, "--bits", "four", code=2)
    qbatch("submit", "--models", listed, "--bits", "4", "--time-limit", "soon", code=2)
    skips = qbatch("submit", "--models", listed, "--bits", "4", "--skip-modules", "lm_head, [fc", code=2)
    assert "'[fc' is not a valid regular expression" in skips.stderr


def test_values_that_no_column_can_hold_are_refused(
    qbatch: Qbatch, postgresql_database: Database, postgresql_url: str, tmp_path: Path, model_list: Callable[..., str]
) -> None:
    (tmp_path / "nul").write_bytes(b"some text\0and more")
    submit = ["submit", "--models", model_list("org/model"), "--bits", "4"]
    qbatch.env["QBATCH_DATABASE_URL"] = postgresql_url
    for options, says in (
        (["--priority", str(2**31)], "2147483648 is not in the range"),
        (["--priority", "9" * 400], "is not in the range"),
        (["--name", "x" * 100_000], "at most 200 characters"),
        (["--name", os.fsdecode(b"a\xffb")], "is not UTF-8 text"),
        (["--eval-text", str(tmp_path / "nul")], "contains NUL characters"),
        (["--eval-text", "/dev/zero"], "contains NUL characters"),
        (["--models", "/dev/zero"], "contains NUL characters"),
        (["--int8-threshold", "inf"], "is not a finite number"),
        (["--time-limit", "9" * 400], "is not a valid duration"),
    ):
        assert says in qbatch(*submit, *options, code=2).stderr, options
    for command in (["wait", f"b{2**31}"], ["show", "j999999999999"], ["results", "--limit", "9" * 30]):
        qbatch(*command, code=2)
    qbatch(*submit, "--priority", str(1 - 2**31), "--name", "\N{GRINNING FACE}" * 200)
    assert [batch["jobs"] for batch in qbatch.json("status")] == [2]


def test_endless_input_is_read_up_to_its_limit(qbatch: Qbatch, model_list: Callable[..., str], tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    with text.open("wb") as file:
        for _ in range(65):
            file.write(b"word" * 2**18)
    submit = ["submit", "--bits", "4", "--models"]
    assert "64 Mi characters" in one_line(qbatch(*submit, model_list("org/model"), "--eval-text", str(text), code=2))
    assert "16 Mi characters" in one_line(qbatch(*submit, str(text), code=2))


def test_a_job_ends_after_a_day_unless_it_is_told_otherwise(qbatch: Qbatch, model_list: Callable[..., str]) -> None:
    submit = ["submit", "--models", model_list("org/model"), "--bits", "16"]
    qbatch(*submit)
    qbatch(*submit, "--time-limit", "15m")
    qbatch(*submit, "--time-limit", "none")
    qbatch.env["QBATCH_TIME_LIMIT_S"] = "3600"
    qbatch(*submit)
    limits = [job["time_limit_s"] for job in qbatch.json("show", "j1", "j2", "j3", "j4")]
    assert limits == [86400.0, 900.0, None, 3600.0]


def test_a_folder_without_config(qbatch: Qbatch, tmp_path: Path, model_list: Callable[..., str]) -> None:
    (tmp_path / "bare").mkdir()
    listed = model_list(tmp_path / "bare")
    assert "has no config.json" in one_line(qbatch("submit", "--models", listed, "--bits", "4", code=2))


def test_ids_that_do_not_exist(qbatch: Qbatch) -> None:
    assert "no such batch: b7" in one_line(qbatch("wait", "b7", code=2))
    assert "no such job: j7" in one_line(qbatch("cancel", "j7", code=2))
    assert "no such batch or job: '7'" in one_line(qbatch("retry", "7", code=2))
    assert "cannot sort by" in one_line(qbatch("results", "--sort", "1; drop table jobs", code=2))


def test_standard_input_is_a_list(qbatch: Qbatch, models: Path) -> None:
    done = qbatch("submit", "--models", "-", "--bits", "4", "-q", stdin=f"{models / 'llama'}\n{models / 'llama'}\n")
    assert "qbatch up" in done.stderr
    assert [job["scheme"] for job in qbatch.json("jobs", "--batch", done.stdout.strip())] == ["none", "bnb-nf4"]


def test_waiting_without_a_stack_is_refused(qbatch: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    listed = model_list(models / "llama")
    qbatch("submit", "--models", listed, "--bits", "4", "--wait", code=3)
    assert "within 1 s" in qbatch("wait", "b1", "--timeout", "1s", code=4).stderr
    assert qbatch("cancel", "b1").stdout.split() == ["j1", "j2"]
    qbatch("wait", "b1", code=1)
    assert qbatch("retry", "j2").stdout.split() == ["j2"]
    assert [job["state"] for job in qbatch.json("jobs")] == ["cancelled", "queued"]


def test_no_gpu_where_one_is_asked_for(qbatch: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    qbatch.env["CUDA_VISIBLE_DEVICES"] = ""
    assert "no NVIDIA GPU" in qbatch("worker", "--gpus", "all", code=3).stderr
    listed = model_list(models / "llama")
    done = qbatch("run", "--models", listed, "--bits", "4", "--device", "cuda", code=3)
    assert "no NVIDIA GPU" in done.stderr


def test_services_that_do_not_answer(qbatch: Qbatch, models: Path, model_list: Callable[..., str]) -> None:
    listed = model_list(models / "llama")
    qbatch.env["QBATCH_BROKER_URL"] = "redis://:secret@127.0.0.1:1/0"
    done = qbatch("submit", "--models", listed, "--bits", "4", "-q")
    assert done.stdout.strip() == "b1"
    assert "when Redis is back" in done.stderr
    assert "secret" not in done.stderr
    qbatch("submit", "--models", listed, "--bits", "4", "--wait", code=3)
    qbatch.env["QBATCH_DATABASE_URL"] = "postgresql://someone:secret@127.0.0.1:1/x"
    done = qbatch("submit", "--models", listed, "--bits", "4", code=3)
    assert "does not answer" in one_line(done)
    assert "secret" not in done.stderr
    qbatch.env["QBATCH_DATABASE_URL"] = "mysql://x"
    assert "SQLite or PostgreSQL" in one_line(qbatch("status", code=2))


def test_storage_that_cannot_be_written(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    qbatch.env["QBATCH_STORAGE"] = str(tmp_path / "file" / "storage")
    listed = model_list(models / "llama")
    assert "file" in one_line(qbatch("run", "--models", listed, "--bits", "4", code=3))


_COMMANDS = (
    *(["status"], ["results"], ["jobs"], ["workers"], ["doctor"], ["verify"], ["wait", "b1"], ["cancel", "b1"]),
    *(["up", "--cpu"], ["scheduler"], ["worker", "--cpu"], ["db", "upgrade"]),
)


@pytest.mark.parametrize("place", ["file", "file/below", "unmakeable"])
def test_an_unusable_home_is_refused_in_one_line(place: str, tmp_path: Path, model_list: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    qbatch = Qbatch(Path("/proc/no/home") if place == "unmakeable" else tmp_path / place)
    listed = model_list("org/model")
    submits = (["submit", "--models", listed, "--bits", "4"], ["run", "--models", listed, "--bits", "4"])
    for command in (*_COMMANDS, *submits) if place == "file" else (["status"], ["doctor"], ["up", "--cpu"]):
        if command == ["doctor"]:
            assert f"{qbatch.home} cannot be written" in qbatch(*command, code=1).stdout
        else:
            assert "file" in one_line(qbatch(*command, code=3)), command


def test_a_home_that_is_read_only_with_the_storage_elsewhere(
    tmp_path: Path, models: Path, model_list: Callable[..., str]
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    qbatch = Qbatch(home, {"QBATCH_STORAGE": str(tmp_path / "storage")}, preexec=without_rights())
    listed = model_list(models / "llama")
    for command in (["status"], ["submit", "--models", listed, "--bits", "4"]):
        assert str(home) in one_line(qbatch(*command, code=3)), command
    for command in (["up", "--cpu"], ["worker", "--cpu"], ["run", "--models", listed, "--bits", "4"]):
        assert f"{home} is not writable" in one_line(qbatch(*command, code=3)), command
    assert f"{home} cannot be written" in qbatch("doctor", code=1).stdout
    qbatch.env["QBATCH_DATABASE_URL"] = f"sqlite:///{tmp_path}/qbatch.db"
    assert "no stack is running here" in qbatch("submit", "--models", listed, "--bits", "4").stderr
    assert list(home.iterdir()) == []


def test_a_bad_model_fails_alone(stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path) -> None:
    truncated = tmp_path / "truncated"
    shutil.copytree(models / "llama", truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    incomplete = tmp_path / "no-weights"
    shutil.copytree(models / "llama", incomplete, ignore=shutil.ignore_patterns("*.safetensors"))
    pickled = tmp_path / "pickled"
    shutil.copytree(incomplete, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    steering = tmp_path / "steering"
    shutil.copytree(models / "llama", steering)
    config = json.loads((steering / "config.json").read_text())
    hostile = "\x1b]0;title\x07\x9b31mNoSuchActivation"
    (steering / "config.json").write_text(json.dumps(config | {"hidden_act": hostile}))
    listed = model_list(truncated, incomplete, pickled, steering, "nobody/nothing-at-all", models / "bert-mlm")
    submit = ("submit", "--models", listed, "--bits", "4", "--no-baseline", "--wait", "--format", "json")
    refused = stack(*submit, code=2).stderr.splitlines()
    assert [line.split(":")[0] for line in refused[1:]] == ["  line 1", "  line 2", "  line 3"]
    assert stack.json("status") == []
    done = stack(*submit, "--keep-going", code=1)
    assert done.stderr.count("left out: line ") == 3
    kinds = {Path(row["model"]).name: (row["state"], row["error_kind"]) for row in json.loads(done.stdout)}
    assert kinds == {
        "steering": ("failed", "unsupported"),
        "nothing-at-all": ("failed", "source_not_found"),
        "bert-mlm": ("succeeded", None),
    }
    assert not list((stack.home / "storage" / ".staging").glob("*/*/*-*"))
    told = [stack("jobs", "--format", format_).stdout for format_ in ("csv", "json", "table")]
    told += [path.read_text() for path in (stack.home / "storage" / "logs").rglob("*.log")]
    assert sum("NoSuchActivation" in text for text in told) >= 4
    assert not any(character in text for text in told for character in "\x1b\x07\x9b")


def test_a_model_that_cannot_be_measured_is_quantized(
    stack: Qbatch, model_list: Callable[..., str], tmp_path: Path
) -> None:
    """A model of speech: its size is all that is asked for, and nothing of that fails."""
    listed = model_list(tiny.make_speech(tmp_path / "speech"))
    asked = ["submit", "--models", listed, "--bits", "4", "--measure", "size", "--wait", "--format", "json"]
    baseline, nf4 = json.loads(stack(*asked).stdout)
    assert [row["state"] for row in (baseline, nf4)] == ["succeeded"] * 2
    assert nf4["weights_bytes"] < baseline["weights_bytes"]
    assert nf4["decode_tokens_per_s"] is None
    assert nf4["not_measured"]["speed"] == "it was not asked for (--measure speed)"
    assert "sound" in stack("verify", nf4["checkpoint_path"]).stdout
    assert "Nothing is recommended" in stack("compare", "--batch", nf4["batch_id"]).stdout
    again = json.loads(stack(*asked).stdout)
    assert [row["reused_from"] for row in again] == [baseline["job_id"], nf4["job_id"]]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "celery", "kombu", "sqlalchemy", "redis", "rich", "alembic")
    script = f"""
import sys
sys.argv = ["qbatch", *sys.argv[1:]]
from qbatch import cli
try:
    cli.main()
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", ["status", "results", "jobs", "workers"])
def test_commands_that_only_read_do_not_import_torch(qbatch: Qbatch, command: str) -> None:
    qbatch("status")
    script = f"""
import sys
sys.argv = ["qbatch", "{command}"]
from qbatch import cli
try:
    cli.main()
except SystemExit:
    pass
heavy = ("torch", "transformers", "celery", "kombu", "alembic")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=qbatch.environ
    )
    assert done.stderr.splitlines()[-1] == "[]"

"""What will certainly fail is refused by ``submit`` with all its lines, before anything is stored."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qbatch.cli import main
from qbatch.worker.measuring import EVAL_TEXTS
from tests import tiny
from tests.incoming import already_quantized, edit_config
from tests.unprivileged import without_rights


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QBATCH_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(home: Path) -> Path:
    return tiny.make_causal(home / "models" / "tiny-llama", dtype="bfloat16")


def qbatch(*arguments: str) -> Result:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def batches() -> list[Any]:
    value: list[Any] = json.loads(qbatch("status", "--json").stdout)
    return value


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _quantized(folder: Path) -> None:
    already_quantized(folder, "nf4")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (_garbage, "model.safetensors is not a safetensors file"),
    "truncated": (_truncated, "it is truncated"),
    "pickled": (_pickled, "has only pickles, no safetensors; use --allow-pickle"),
    "unknown type": (lambda folder: edit_config(folder, model_type="quux"), "does not know the model type 'quux'"),
    "unknown class": (lambda folder: edit_config(folder, architectures=["Quux"]), "has no architecture 'Quux'"),
    "quantized": (_quantized, "the source is already quantized"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "too many layers": (lambda folder: edit_config(folder, num_hidden_layers=10**6), "sets num_hidden_layers to"),
}


def test_all_bad_lines_are_named_at_once_and_nothing_is_stored(home: Path, model: Path) -> None:
    for name, (spoil, _) in FAULTS.items():
        spoil(tiny.make_causal(home / name, dtype="bfloat16"))
    (home / "list").write_text("\n".join(["# ours", str(model), *(f"./{name}" for name in FAULTS), "what is this?"]))
    for arguments in (("submit",), ("run",)):
        done = qbatch(*arguments, "--models", "list", "--bits", "4")
        assert (done.exit_code, done.stdout) == (2, "")
        first, *lines = done.stderr.splitlines()
        assert (
            first == f"qbatch: {len(FAULTS) + 1} of {len(FAULTS) + 2} models cannot be used, so nothing was submitted:"
        )
        assert [line.split(":")[0] for line in lines] == [f"  line {n}" for n in range(3, len(FAULTS) + 4)]
        for line, (name, (_, says)) in zip(lines, FAULTS.items(), strict=False):
            assert says in line
            assert f"./{name}" in line
            assert str(home) not in line, "the folder is named once, as it was given"
    assert batches() == []


def test_a_bound_below_the_quantized_model_is_refused(model: Path) -> None:
    asked = ("submit", str(model), "--scheme", "auto", "--measure", "size,quality", "--max-weights-bytes")
    refused = qbatch(*asked, "100KB")
    assert (refused.exit_code, batches()) == (2, [])
    line = r"--max-weights-bytes allows 100,000 bytes, and with every layer quantized the weights take ([\d,]+)"
    found = re.search(line, " ".join(refused.stderr.split()))
    assert found is not None
    least = int(found[1].replace(",", ""))
    # As in test_output_size.py, the weights take that in memory. The files, with their headers, are larger.
    assert qbatch(*asked, f"{least - 1}").exit_code == 2
    assert qbatch(*asked, f"{least}").exit_code == 0


def test_with_keep_going_the_others_are_submitted(home: Path, model: Path) -> None:
    _garbage(tiny.make_causal(home / "bad", dtype="bfloat16"))
    done = qbatch("submit", str(model), "./bad", "--bits", "4", "--keep-going", "-q")
    assert (done.exit_code, done.stdout) == (0, "b1\n")
    assert "left out: ./bad: model.safetensors is not a safetensors file" in done.stderr
    assert [batch["jobs"] for batch in batches()] == [2]
    assert qbatch("submit", "./bad", "--bits", "4", "--keep-going").exit_code == 2
    assert len(batches()) == 1


def test_a_text_to_train_on_that_repeats_another_is_refused(home: Path, model: Path) -> None:
    passage = " ".join(EVAL_TEXTS["prose"].read_text(encoding="utf-8").split()[200:240])
    own = " ".join(f"A word, number {number}." for number in range(400))
    (home / "own.txt").write_text(own)
    (home / "shared.txt").write_text(f"{own}\n{passage}\n{own}")
    other = tiny.make_causal(home / "no-tokenizer", dtype="bfloat16")
    (other / "tokenizer.json").unlink()
    arguments = ["--bits", "4", "--recover", "qlora", "--recover-steps", "2", "--recover-text"]
    for command in (["submit"], ["plan"], ["submit", "--dry-run"]):
        done = qbatch(*command, str(model), "./no-tokenizer", *arguments, "shared.txt")
        assert done.exit_code == 2
        assert f"{model}: the recovery text shares 13 tokens in a row with an evaluation text ('" in done.stderr
        assert "no-tokenizer:" not in done.stderr, "of which only a worker can say it"
    assert batches() == []
    assert qbatch("submit", str(model), *arguments, "own.txt").exit_code == 0
    code = ["--eval-text", "code"]
    assert qbatch("submit", str(model), *arguments, "shared.txt", *code).exit_code == 0
    both = qbatch("submit", str(model), *arguments, "shared.txt", *code, "--eval-text", "prose")
    assert both.exit_code == 2


def test_pickles_are_accepted_where_they_are_converted(home: Path, model: Path) -> None:
    _pickled(model)
    assert qbatch("submit", str(model), "--bits", "4").exit_code == 2
    assert qbatch("submit", str(model), "--bits", "4", "--allow-pickle").exit_code == 0


def test_where_workers_see_other_files_it_is_only_said(
    home: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QBATCH_BROKER_URL", "redis://192.0.2.1:1/0")
    monkeypatch.setenv("QBATCH_MODEL_ROOTS", str(home))
    _garbage(model)
    from qbatch.commands.context import current_settings
    from qbatch.commands.request import read_submission
    from qbatch.commands.submission import submit

    context = submit.make_context("submit", [str(model), "--bits", "4"], help_option_names=["-h", "--help"])
    asked = read_submission(current_settings(), context.params)
    assert [source.name for source in asked.sources] == [str(model)]


def test_a_folder_that_was_mistyped_is_not_sent_to_the_hub(home: Path, model: Path) -> None:
    done = qbatch("submit", "models/tiny-lama", "--bits", "4")
    assert done.exit_code == 2
    assert "did you mean models/tiny-llama?" in done.stderr
    assert batches() == []
    assert qbatch("submit", "models/tiny-lama@main", "--bits", "4").exit_code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", "8", "--quant-type", "fp4"), "--quant-type fp4 applies to 4 bits, which were not asked for"),
        (("--bits", "4", "--int8-threshold", "0"), "--int8-threshold applies only to bnb-int8"),
        (("--bits", "8", "--quant-storage", "bfloat16"), "--quant-storage applies only to bnb-nf4 and bnb-fp4"),
        (("--bits", "8", "--double-quant"), "double quantization needs a 4-bit scheme"),
        (("--bits", "16", "--skip-modules", "lm_head"), "the baseline writes none"),
        (("--bits", "16", "--max-shard-size", "1GB"), "the baseline writes none"),
        (("--bits", "16", "--compute-dtype", "bfloat16"), "the baseline computes in the type of its inputs"),
        (("--bits", "4", "--tasks", "hellaswg,arc_easy"), "has no task 'hellaswg'"),
    ],
)
def test_an_option_without_an_effect_is_refused(model: Path, options: tuple[str, ...], says: str) -> None:
    done = qbatch("submit", str(model), *options)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
    assert batches() == []


def test_a_model_given_as_a_list_is_told_how_it_is_named(home: Path) -> None:
    done = qbatch("submit", "--models", "meta-llama/Llama-3.1-8B", "--bits", "4")
    assert done.exit_code == 2
    assert "there is no file meta-llama/Llama-3.1-8B" in done.stderr
    assert "qbatch submit meta-llama/Llama-3.1-8B" in done.stderr


def test_whatever_is_given_as_a_list_or_model_ends_in_a_message(home: Path, model: Path) -> None:
    (home / "binary").write_bytes(bytes(range(256)) * 50)
    (home / "nul").write_bytes(b"org/model\0\n")
    (home / "huge").write_text("x" * 5_000_000)
    (home / "loop").symlink_to("loop")
    (home / "cycle").mkdir()
    (home / "cycle" / "self").symlink_to("../cycle")
    (home / "cycle" / "config.json").symlink_to("config.json")
    (home / "weights loop").mkdir()
    (home / "weights loop" / "config.json").write_text('{"model_type": "llama"}')
    (home / "weights loop" / "model.safetensors.index.json").symlink_to("model.safetensors.index.json")
    for name in ("binary", "nul", "huge", "loop", "models", "missing", "x" * 5000, "loop/x", "/dev/null", ""):
        done = qbatch("submit", "--models", name, "--bits", "4")
        assert (done.exit_code, done.stdout) == (2, ""), name
        assert "Traceback" not in done.stderr
    for name in ("loop", "cycle", "x" * 5000, "./loop/x", "./cycle/self", "binary", "weights loop", "~nobody/x", ""):
        assert qbatch("submit", f"./{name}", "--bits", "4").exit_code == 2, name
    assert batches() == []


def test_what_may_not_be_read_is_named(home: Path, model: Path) -> None:
    (home / "list").write_text("org/model\n")
    shut = [home / "list", home / "a" / "model.safetensors", home / "b" / "config.json", home / "c"]
    for folder in "abc":
        shutil.copytree(model, home / folder)
    for path in shut:
        path.chmod(0)
    for given in (("--models", "list"), ("./a", "./b", "./c")):
        command = [sys.executable, "-m", "qbatch", "submit", *given, "--bits", "4"]
        done = subprocess.run(command, preexec_fn=without_rights(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.count("Permission denied") == len(given[-1:] if "list" in given else given), done.stderr
    (home / "c").chmod(0o700)


@pytest.mark.parametrize(("answer", "is_folder"), [("y", True), ("n", False)])
def test_on_a_terminal_a_mistyped_folder_is_asked_about(home: Path, model: Path, answer: str, is_folder: bool) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qbatch", "submit", "models/tiny-lama", "--bits", "4"]
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, check=False)
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert done.returncode == 0, said
    assert "Use the folder models/tiny-llama" in " ".join(said.split())
    (job, _) = json.loads(qbatch("jobs", "--json").stdout)
    assert job["model"] == ("models/tiny-llama" if is_folder else "models/tiny-lama")

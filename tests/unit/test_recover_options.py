"""``--recover``: which adapters it asks for, which texts are stored for them, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

from qbatch.commands.request import read_submission
from qbatch.commands.submission import submit
from qbatch.core.errors import Unsupported, UsageError
from qbatch.core.settings import Settings
from qbatch.scheduler import submit as submitting
from qbatch.scheduler.submit import Submission
from qbatch.worker.models import adapted_model
from qbatch.worker.searching import DEFAULT_SEARCH_TEXT

SEARCH_TEXT = DEFAULT_SEARCH_TEXT.read_text(encoding="utf-8")


def submission(folder: Path, *arguments: str) -> Submission:
    models = folder / "models.txt"
    models.write_text("org/a\n")
    # Without its names, the help option of every later test would lack one.
    context = submit.make_context(
        "submit", ["--models", str(models), "--bits", "4", *arguments], help_option_names=["-h", "--help"]
    )
    return read_submission(Settings(home=folder, storage=folder, cache=folder), context.params)


def slugs(asked: Submission) -> list[str]:
    return [scheme.recovery.slug for scheme in asked.grid.schemes() if scheme.recovery is not None]


@pytest.mark.parametrize(
    ("arguments", "expected", "texts"),
    [
        ([], [], ()),
        (["--recover", "svd"], ["svd-r8"], ()),
        (["--recover", "svd,svd-act,svd"], ["svd-r8", "svd-act-r8"], (SEARCH_TEXT,)),
        (["--recover", "svd", "--recover", "svd-act"], ["svd-r8", "svd-act-r8"], (SEARCH_TEXT,)),
        (
            ["--recover", "svd-act", "--recover-rank", "8,2", "--recover-rank", "8"],
            ["svd-act-r8", "svd-act-r2"],
            (SEARCH_TEXT,),
        ),
    ],
)
def test_adapters_are_asked_for_by_kind_and_rank(
    tmp_path: Path, arguments: list[str], expected: list[str], texts: tuple[str, ...]
) -> None:
    asked = submission(tmp_path, *arguments)
    assert slugs(asked) == expected
    assert asked.recovery_texts == texts


def test_the_text_of_a_training_is_stored_and_needed(tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("What the adapter is trained on.")
    asked = submission(tmp_path, "--recover", "qlora", "--recover-text", str(text), "--recover-steps", "40")
    assert slugs(asked) == ["qlora-r8-s40"]
    assert asked.recovery_texts == (text.read_text(),)
    recovery = asked.grid.schemes()[-1].recovery
    assert recovery is not None
    assert asked.specs()[-1].text_hashes == (asked.text_sha256, recovery.text_sha256)
    assert asked.specs()[1].text_hashes == (asked.text_sha256,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recover-rank", "4"], "--recover-rank is about adapters, which --recover asks for"),
        (["--recover", "svd", "--recover-steps", "4"], "--recover-text and --recover-steps are for --recover qlora"),
        (["--recover", "qlora"], "--recover qlora needs a text to train on and a number of steps"),
        (["--recover", "svd", "--recover-rank", "5000"], "from 1 to 4096, not 5000"),
        (
            ["--recover", "qlora", "--recover-steps", "4", "--recover-text", "/nowhere/text"],
            "cannot read /nowhere/text: No such file",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        submission(tmp_path, *arguments)


def test_an_empty_text_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UsageError, match=r"the recovery text .* is empty"):
        submission(tmp_path, "--recover", "qlora", "--recover-steps", "4", "--recover-text", str(empty))
    with pytest.raises(click.BadParameter, match="is not a kind of adapter"):
        submission(tmp_path, "--recover", "svd,magic")


def test_without_peft_it_is_said_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (submitting, adapted_model):
        monkeypatch.setattr(module, "is_installed", lambda library: library != "peft")
    line = r"peft, which is not installed here: pip install 'qbatch\[recover\]'"
    with pytest.raises(UsageError, match=f"--recover needs {line}"):
        submitting.refuse_missing_libraries(submission(tmp_path, "--recover", "svd").grid)
    submitting.refuse_missing_libraries(submission(tmp_path).grid)
    with pytest.raises(Unsupported, match=f"(?i)an adapter is loaded with {line}"):
        adapted_model.with_adapter(None, tmp_path)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Unsupported, match=r"cannot be imported \(.*\): pip install 'qbatch\[recover\]'"):
        adapted_model.with_adapter(None, tmp_path)

"""``import qbatch``: what the README shows runs as it stands, and the words are those of the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import qbatch
from qbatch.core.errors import StackNotRunning, UsageError
from tests.acceptance.conftest import Qbatch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing runs."""
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_lines_of_the_readme_run(stack: Qbatch, models: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(import qbatch\n.*?)```", README, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "examples" / "models").mkdir(parents=True)
    for name in ("llama", "bloom"):
        (tmp_path / "examples" / "models" / f"tiny-{name}").symlink_to(models / name)
    here = replace(stack, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        env=here.environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" bnb-nf4 ") == 4, done.stdout
    assert str(stack.home / "storage" / "checkpoints" / "tiny-llama") in done.stdout
    batches = here.json("status")
    assert batches[-1]["name"] == "from Python"
    assert batches[-1]["succeeded"] == 6


def test_options_are_those_of_the_command_line(home: Path, models: Path) -> None:
    with pytest.warns(UserWarning, match="qbatch up"):
        batch = qbatch.submit([models / "llama"], bits=[4], quant_type=["nf4", "fp4"], baseline=False, priority=3)
    assert (batch.id, batch.jobs, batch.answered) == ("b1", 2, 0)
    rows = batch.results()
    assert [(row.scheme, row.state, row.kl_mean) for row in rows] == [
        ("bnb-nf4", "queued", None),
        ("bnb-fp4", "queued", None),
    ]
    assert list(qbatch.results("b1", limit=1).frame()["scheme"]) == ["bnb-nf4"]
    assert len(rows[:1]) == 1
    assert repr(rows).splitlines()[:2] == [
        "<ResultRows of 2 jobs>",
        f"  <ResultRow j1: {models / 'llama'} bnb-nf4, queued>",
    ]
    with pytest.raises(StackNotRunning, match="qbatch up"):
        batch.wait()


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"bits": "four"}, "bits: 'four' is not a list of bit widths"),
        ({"bits": [4], "time_limit": "soon"}, "time_limit: 'soon' is not a valid duration"),
        ({"bits": [4], "baseline": "yes"}, "baseline must be True or False"),
        ({"bits": [5]}, "5"),
    ],
)
def test_a_value_that_the_command_refuses_is_refused(
    options: dict[str, object], refusal: str, home: Path, models: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(refusal)):
        qbatch.submit([models / "llama"], **options)
    assert not home.exists()


def test_a_search_is_asked_for_in_the_words_of_the_command_line(home: Path, models: Path) -> None:
    with pytest.warns(UserWarning, match="qbatch up"):
        batch = qbatch.submit([models / "llama"], bits=[8], scheme="auto", max_kl=0.01)
    assert [(row.scheme, row.bits, row.mixture.bound) for row in batch.results()] == [
        ("none", 16, None),
        ("bnb-int8", 8, None),
        ("bnb-nf4", 4, {"max_kl": 0.01}),
    ]
    for options, problem in (
        ({"scheme": "auto"}, "needs exactly one of"),
        ({"scheme": "auto", "max_kl": 0.01, "max_weights_bytes": "1GB"}, "needs exactly one of"),
        ({"bits": [4], "max_kl": 0.01}, "--max-kl applies only to --scheme auto"),
        ({"scheme": "auto", "max_ppl_ratio": 1.01, "measure": "speed"}, "is about quality"),
    ):
        with pytest.raises(UsageError, match=problem):
            qbatch.submit([models / "llama"], **options)


def test_an_option_that_does_not_exist_is_named(home: Path) -> None:
    with pytest.raises(TypeError, match=r"no option 'width'; its options are .*bits, .*double_quant, .*skip_modules"):
        qbatch.submit(["org/model"], width=4)
    with pytest.raises(TypeError, match="brackets"):
        qbatch.submit("org/model", bits=[4])
    with pytest.raises(UsageError, match="no such batch: b7"):
        qbatch.results("b7")


def test_importing_qbatch_is_light() -> None:
    script = "import sys, qbatch; dir(qbatch); print([name for name in sys.modules if name.startswith('qbatch.')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    script = "import sys; from qbatch import submit; print('torch' in sys.modules, 'sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"

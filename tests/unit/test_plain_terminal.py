"""Whatever the encoding of a terminal, and whoever the user of a container, a command says what it has to say."""

from __future__ import annotations

import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.plain_terminal import show_anything
from tests.unit.test_inspection import write_tensors

ENCODINGS = ("latin-1", "cp1252", "iso8859-15", "ascii", "utf-8")
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


def qbatch(*words: str | Path, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qbatch", *map(str, words)],
        env={"PATH": os.environ["PATH"]} | environ,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "\u6a21\u578b \u2013 \u00fc", {"x": ("F32", [2], 8)}, {"model_type": "llama"})
    done = qbatch("inspect", folder, PYTHONIOENCODING=encoding, PYTHONUTF8="1", QBATCH_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    is_unicode = encoding in ("ascii", "utf-8")  # click writes UTF-8 where it is told ASCII
    shown = done.stdout.decode("utf-8" if is_unicode else encoding)
    assert ("\u6a21" if is_unicode else "\\u6a21") in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_no_figure_is_lost_in_any_encoding(golden: Path, encoding: str) -> None:
    text = golden.read_text(encoding="utf-8")
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show_anything(stream)
    stream.write(text)
    stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "?" not in shown.replace("?", "", text.count("?"))
    assert "\\u" not in shown, "each character of ours has a plain form"


def test_a_user_without_a_home_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(_uid: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    done = CliRunner().invoke(main, ["jobs"], env={"HOME": None, "QBATCH_HOME": None})
    assert done.exit_code == 2
    assert done.stderr == (
        "qbatch: HOME is not set, and this user has no entry in /etc/passwd: set QBATCH_HOME to the path of a folder\n"
    )

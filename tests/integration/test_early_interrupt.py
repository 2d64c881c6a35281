"""Ctrl-C before the command line is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# Where the commands are about to be imported, as an impatient user presses it.
_PRESSES_CTRL_C = """
import os, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "qbatch.commands.waiting":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
"""


def _status(tmp_path: Path, *shell: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(_PRESSES_CTRL_C)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "QBATCH_HOME": str(tmp_path / "home")}
    argv = [*shell, sys.executable, "-m", "qbatch", "status"]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)


def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    done = _status(tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_who_is_to_ignore_ctrl_c_ignores_it_during_the_imports_too(tmp_path: Path) -> None:
    done = _status(tmp_path, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    assert done.returncode == 0, done.stderr

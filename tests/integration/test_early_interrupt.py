"""Ctrl-C before the command line is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from qbatch.commands.context import INTERRUPTED

# Where a module is about to be imported, as an impatient user presses it.
_PRESSES_CTRL_C = """
import os, signal, sys

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
"""


def _status(tmp_path: Path, *shell: str, module: str = "click") -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(_PRESSES_CTRL_C.format(module=module))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "QBATCH_HOME": str(tmp_path / "home")}
    argv = [*shell, sys.executable, "-m", "qbatch", "status"]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)


def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    done = _status(tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback_either(tmp_path: Path) -> None:
    done = _status(tmp_path, module="qbatch.commands.queue_state")
    assert (done.returncode, done.stderr) == (INTERRUPTED, "\n")


def test_who_is_to_ignore_ctrl_c_ignores_it_during_the_imports_too(tmp_path: Path) -> None:
    done = _status(tmp_path, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    assert done.returncode == 0, done.stderr

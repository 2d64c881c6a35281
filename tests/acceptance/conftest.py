"""The installed ``qbatch``, driven as a user drives it: real processes, a home of its own, models made on the spot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.orm import Session

from qbatch.core.settings import Settings
from qbatch.models_db.listing import list_jobs, list_workers
from qbatch.models_db.session import Database
from tests import tiny, warm_commands
from tests.waiting import until

Rows = list[dict[str, Any]]

_INSTALLED = Path(sys.executable).with_name("qbatch")
# A GPU host may run the working tree without installing it.
QBATCH = [str(_INSTALLED)] if _INSTALLED.exists() else [sys.executable, "-m", "qbatch"]


@dataclass
class Qbatch:
    """``qbatch`` in one environment."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    # What is called in each process that it starts, before it becomes qbatch.
    preexec: Callable[[], None] | None = None

    @property
    def environ(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("QBATCH_")}
        return inherited | {"QBATCH_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"} | self.env

    def __call__(
        self, *args: str, code: int | None = 0, stdin: str | None = None, timeout_s: float = 150.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its exit code must be ``code``, and it must not show a traceback."""
        if self.preexec is None and warm_commands.suits(args[0], self.environ):
            done = warm_commands.run(
                [QBATCH[0], *args], environ=self.environ, cwd=self.cwd, stdin=stdin or "", timeout_s=timeout_s
            )
        else:
            done = self._run(args, stdin or "", timeout_s)
        assert "Traceback" not in done.stderr, done.stderr
        assert code is None or done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def _run(self, args: Sequence[str], stdin: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*QBATCH, *args],
            env=self.environ,
            cwd=self.cwd,
            preexec_fn=self.preexec,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def json(self, *args: str, code: int = 0) -> Any:
        return json.loads(self(*args, "--json", code=code).stdout)

    def start(self, *args: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        with (log or self.home.with_suffix(".log")).open("ab") as output:
            return subprocess.Popen(
                [*QBATCH, *args],
                env=self.environ,
                cwd=self.cwd,
                preexec_fn=self.preexec,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def look(self, listing: Callable[[Session], Rows]) -> Rows:
        """What a command would list, for whoever looks again and again: a command takes most of a second of a core to
        start, which those that are waited for need."""
        database = Database(Settings.from_env(self.environ).sqlalchemy_url)
        try:
            if database.is_behind():
                return []
            with database.read() as session:
                return listing(session)
        finally:
            database.dispose()

    def states(self) -> set[str]:
        """Those in which there are jobs."""
        return {job["state"] for job in self.look(list_jobs)}

    def wait_for_worker(self) -> None:
        lease_s = Settings.from_env(self.environ).lease_s
        until(lambda: _is_any_ready(self.look(lambda session: list_workers(session, lease_s))), "live worker")
        assert _is_any_ready(self.json("workers"))


def _is_any_ready(workers: Rows) -> bool:
    return any(worker["state"] == "ready" for worker in workers)


def stop(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
    """Send the signal; the exit code."""
    process.send_signal(number)
    return process.wait(timeout_s)


def processes_of(home: Path) -> list[psutil.Process]:
    """Every living process that has this home in its environment, and the Redis on its socket.

    Those of qbatch's that hide their environment, from all but root, are known by their relatives.
    """
    settings = Settings.from_env(os.environ | {"QBATCH_HOME": str(home)})
    places = {str(settings.socket_dir), str(settings.socket.resolve().parent)}
    found, hidden = [], []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = " ".join(process.cmdline())
            if any(place in words for place in places) or process.environ().get("QBATCH_HOME") == str(home):
                found.append(process)
        except psutil.AccessDenied:
            hidden.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    while related := [process for process in hidden if _is_relative(process, found)]:
        found += related
        hidden = [process for process in hidden if process not in related]
    return found


def command_lines(home: Path) -> dict[psutil.Process, list[str]]:
    """Those of ``processes_of`` that have not ended while they were looked at."""
    found = {}
    for process in processes_of(home):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = process.cmdline()
    return found


def _is_relative(process: psutil.Process, family: list[psutil.Process]) -> bool:
    try:
        is_ours = any(word in ("worker", "scheduler") or Path(word).name == "qbatch" for word in process.cmdline())
        return is_ours and any(one.pid == process.ppid() or one.ppid() == process.pid for one in family)
    except psutil.Error:
        return False


def await_end_of(home: Path) -> None:
    """Wait until nothing of this home runs. A forkserver takes seconds to leave, more on a busy machine."""
    deadline = time.monotonic() + 60.0
    while left := processes_of(home):
        assert time.monotonic() < deadline, f"still there: {[process.as_dict(['pid', 'cmdline']) for process in left]}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama (bfloat16), bloom (float32) and bert-mlm, in one folder."""
    folder = tmp_path_factory.mktemp("models")
    tiny.make_causal(folder / "llama", arch="llama", dtype="bfloat16")
    tiny.make_causal(folder / "bloom", arch="bloom", dtype="float32")
    tiny.make_encoder(folder / "bert-mlm", head="masked-lm")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def qbatch(home: Path) -> Iterator[Qbatch]:
    """A home of the test's own; nothing of it may be left running."""
    yield Qbatch(home)
    await_end_of(home)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qbatch]:
    """``qbatch up --cpu``, shared by the tests that only submit to it."""
    shared = Qbatch(tmp_path_factory.mktemp("stack") / "home")
    process = shared.start("up", "--cpu")
    try:
        until(lambda: (shared.home / "qbatch.db").exists(), "database")
        shared.wait_for_worker()
        yield shared
    finally:
        assert stop(process, signal.SIGINT) == 0
        await_end_of(shared.home)


@pytest.fixture
def model_list(tmp_path: Path) -> Callable[..., str]:
    """Writes a list file and returns its path."""

    def write(*lines: str | Path) -> str:
        path = tmp_path / f"models-{len(list(tmp_path.glob('models-*')))}.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write

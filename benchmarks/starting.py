"""What a command takes before it can do anything.

    python -m benchmarks.starting
    python -m benchmarks.starting --repeats 10

CPU seconds of commands on an almost empty SQLite database, imports included, beside those of ``import click,
sqlalchemy``, which every command must import. All take turns, and the least of each is shown: the machine may be busy
with other things. Exits with 1 if one takes more than the target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.database.command import measure
from benchmarks.random_source import build_source, build_tokenizer

_IMPORT = "import click, sqlalchemy"
_CPU_S = f"{_IMPORT}; import time; print(time.process_time())"
_TARGET = 1.3


def import_s() -> float:
    """CPU seconds of a process that makes those imports."""
    done = subprocess.run([sys.executable, "-c", _CPU_S], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qbatch-bench-") as name:
        folder = Path(name)
        model = folder / "model"
        build_source("tiny", model)
        build_tokenizer(model)
        environ = {"QBATCH_HOME": str(folder / "home"), "QBATCH_DATABASE_URL": f"sqlite:///{folder / 'qbatch.db'}"}
        # Each submit after the first finds the job of the one before, as it would in use.
        commands = {
            "submit": ("submit", str(model), "--bits", "4"),
            "status": ("status",),
            "status BATCH": ("status", "b1"),
            "jobs": ("jobs",),
            "results": ("results",),
        }
        measure(commands["submit"], environ)
        least = _least(commands, environ, arguments.repeats)
    print(f"{'':28} {'CPU s':>6} {'of the import':>13}   (target: {_TARGET})")
    for name, cpu_s in least.items():
        print(f"{name:28} {cpu_s:6.2f} {cpu_s / least[_IMPORT]:13.2f}")
    return int(max(least.values()) > _TARGET * least[_IMPORT])


def _least(commands: Mapping[str, Sequence[str]], environ: Mapping[str, str], repeats: int) -> dict[str, float]:
    """CPU seconds by name, those of the import first."""
    least = dict.fromkeys([_IMPORT, *commands], float("inf"))
    for _ in range(repeats):
        least[_IMPORT] = min(least[_IMPORT], import_s())
        for name, command in commands.items():
            least[name] = min(least[name], measure(command, environ).cpu_s)
    return least


if __name__ == "__main__":
    raise SystemExit(main())

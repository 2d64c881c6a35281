"""One command of qbatch in a process of its own, which notes what it took.

python -m benchmarks.database.command NOTE status b12
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """``cpu_s`` is that of the whole process, imports included; ``peak_bytes`` its largest resident memory."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    printed_bytes: int


def measure(arguments: Sequence[str], environ: Mapping[str, str]) -> Taken:
    """Run ``qbatch`` with these arguments. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note.json"
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.database.command", str(note), *arguments],
            env=os.environ | environ,
            capture_output=True,
            check=False,
        )
        wall_s = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(f"qbatch {' '.join(arguments)} ended with {done.returncode}: {done.stderr.decode()}")
        return Taken(wall_s=wall_s, printed_bytes=len(done.stdout), **json.loads(note.read_text()))


def least(arguments: Sequence[str], environ: Mapping[str, str], repeats: int) -> Taken:
    """Of several runs, the one that took the least CPU time: the machine may be busy with other things."""
    return min((measure(arguments, environ) for _ in range(repeats)), key=lambda one: one.cpu_s)


def _note(path: Path) -> None:
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    path.write_text(json.dumps({"cpu_s": time.process_time(), "peak_bytes": peak_kib * 1024}))


def main() -> None:
    note, *arguments = sys.argv[1:]
    atexit.register(_note, Path(note))
    sys.argv = ["qbatch", *arguments]
    from qbatch.__main__ import main as qbatch

    qbatch()


if __name__ == "__main__":
    main()

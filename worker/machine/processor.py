"""The processor, as the system describes it."""

from __future__ import annotations

import platform
from pathlib import Path


def cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty if there is none, as on other systems than Linux."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def processor_name() -> str:
    """The name of the processor, by which workers are listed and results are compared."""
    names = (line.partition(":")[2].strip() for line in cpuinfo().splitlines() if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()

"""Where a pid is valid."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil


def pid_space() -> str:
    """Identifies where a pid is valid: one boot and one pid namespace. It differs between containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{psutil.boot_time():.0f}"

"""What is left of the host's memory for this process: in a container, of the container's share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_MINE = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Of a control group of version 2, and of version 1: its limit, what it takes, and how much of that is cached files that
# the kernel gives up first.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(mine: Path = _MINE, groups: Path = _GROUPS) -> int:
    """Bytes that can be taken before the kernel kills somebody: the least that the host or a limit leaves.

    ``mine`` lists the process's control groups, which are mounted under ``groups``.
    """
    return min([psutil.virtual_memory().available, *_left_by_limits(mine, groups)])


def _left_by_limits(mine: Path, groups: Path) -> Iterator[int]:
    """What each group that the process is in, and each that this is in, leaves below its limit."""
    for root, path in _memory_groups(mine, groups):
        # A container may see its own group at the root and still be told its path on the host.
        for place in (path, *path.parents):
            left = _left(root / place.relative_to("/"))
            if left is not None:
                yield left


def _memory_groups(mine: Path, groups: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # no Linux, or no control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield groups, PurePosixPath(path)
        elif "memory" in controllers.split(","):
            yield groups / "memory", PurePosixPath(path)


def _left(group: Path) -> int | None:
    """None without a limit, and where there is no such group."""
    for limit_name, used_name, cached_name in _FILES:
        try:
            limit, used = (group / limit_name).read_text().strip(), (group / used_name).read_text()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return None if limit == "max" else int(limit) - int(used) + int(stat.get(cached_name, 0))
    return None

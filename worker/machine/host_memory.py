"""How much host memory is left for this process, taking the limits of its container into account."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_MINE = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# For control groups of version 2 and of version 1: the files with the limit and the usage, and the statistic of cached
# files, which the kernel drops first.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(mine: Path = _MINE, groups: Path = _GROUPS) -> int:
    """The bytes that can be allocated before the kernel kills a process: the smallest rest of the host or any limit.

    ``mine`` is the file that lists the control groups of the process, which are mounted under ``groups``.
    """
    return min([psutil.virtual_memory().available, *_left_by_limits(mine, groups)])


def _left_by_limits(mine: Path, groups: Path) -> Iterator[int]:
    """The bytes left below the limit of each group of the process, and of the groups above it."""
    for root, path in _memory_groups(mine, groups):
        # In a container, its own group may be mounted at the root although the listed path is that on the host.
        for group in (path, *path.parents):
            left = _left(root / group.relative_to("/"))
            if left is not None:
                yield left


def _memory_groups(mine: Path, groups: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # not Linux, or no control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield groups, PurePosixPath(path)
        elif "memory" in controllers.split(","):
            yield groups / "memory", PurePosixPath(path)


def _left(group: Path) -> int | None:
    """The bytes left below the group's limit; None if it has no limit or does not exist."""
    for limit_name, used_name, cached_name in _FILES:
        try:
            limit, used = (group / limit_name).read_text().strip(), (group / used_name).read_text()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return None if limit == "max" else int(limit) - int(used) + int(stat.get(cached_name, 0))
    return None

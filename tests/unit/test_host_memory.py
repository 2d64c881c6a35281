"""How much memory is left, under the limits of control groups as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from qbatch.worker.machine.host_memory import available_memory

MIB = 2**20


def group(folder: Path, *, limit: int | str, used: int, cached: int = 0, version: int = 2) -> None:
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    limit_name, used_name, cached_name = names[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{limit_name}").write_text(f"{limit}\n")
    (folder / f"memory.{used_name}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{cached_name} {cached}\n")


def available(folder: Path, mine: str) -> int:
    (folder / "mine").write_text(mine)
    return available_memory(folder / "mine", folder)


def test_a_limit_leaves_what_is_not_taken_and_what_is_only_cached(tmp_path: Path) -> None:
    group(tmp_path / "pod", limit=100 * MIB, used=80 * MIB, cached=30 * MIB)
    assert available(tmp_path, "0::/pod\n") == 50 * MIB


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    group(tmp_path / "pod", limit=100 * MIB, used=95 * MIB)
    group(tmp_path / "pod" / "container", limit="max", used=10 * MIB)
    assert available(tmp_path, "0::/pod/container\n") == 5 * MIB


def test_a_container_that_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    group(tmp_path / "memory", limit=64 * MIB, used=MIB, version=1)
    assert available(tmp_path, "5:devices:/\n4:cpu,memory:/docker/9f2c\n0::/\n") == 63 * MIB


@pytest.mark.parametrize("limit", ["max", 2**63 - 4096])
def test_without_a_limit_it_is_the_host_s(tmp_path: Path, limit: int | str) -> None:
    group(tmp_path, limit=limit, used=MIB)
    assert available(tmp_path, "0::/\n") == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_without_control_groups_it_is_the_host_s(tmp_path: Path) -> None:
    found = available_memory(tmp_path / "none", tmp_path)
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)

"""The node's cache of sources, on a disk that may be smaller than it or have no locks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qbatch.core.errors import DiskFull, StorageError
from qbatch.worker.sources.source_cache import SourceCache


def test_a_source_larger_than_the_caches_disk_is_not_waited_for(tmp_path: Path) -> None:
    disk = shutil.disk_usage(tmp_path)
    cache = SourceCache(root=tmp_path / "cache", limit_bytes=2**62)
    with cache.using("a"):
        with pytest.raises(StorageError, match="more than the disk of the source cache: set QBATCH_CACHE"):
            cache.reserve("a", {"model.safetensors": disk.used + 2 * disk.free})
        with pytest.raises(DiskFull) as caught:
            cache.reserve("a", {"model.safetensors": disk.free + disk.used // 2})
    assert caught.value.needed_bytes is not None, "it waits for room, and was not cut short"

"""What holds for every test here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# By itself an example may take 200 ms, which a busy machine takes for anything now and then.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def trained_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learned something. Training it takes seconds, so its tests share it."""
    from tests.trained import make_trained  # imports what trains it, which most tests do without

    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def disk_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each file and folder that is synced, and by "rename"; both are done all the same."""
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    return done

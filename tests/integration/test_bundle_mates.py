"""Cancelling a job ends its process: ``qbatch cancel`` says which others ran in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.domain import Method
from qbatch.models_db.session import Database
from tests.rows import a_batch, a_worker, bundle, claim


def test_cancel_names_those_that_begin_again(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    _, ids = a_batch(sqlite_database, bundle("/models/a"), bundle("/models/b", Method.NF4), bundle("/models/c"))
    claim(sqlite_database, ids[:3], a_worker(sqlite_database, "w1"))
    claim(sqlite_database, [ids[3]], a_worker(sqlite_database, "w2"))
    done = CliRunner().invoke(main, ["cancel", "j2"])
    assert done.stdout == "j2\n"
    assert "j1, j3 ran in the same process, which is ended: started again, without counting a failure" in done.stderr
    for alone in ("j4", "j5"):
        assert "same process" not in CliRunner().invoke(main, ["cancel", alone]).stderr, "nobody else runs there"
    assert "same process" not in CliRunner().invoke(main, ["cancel", "b1"]).stderr, "all of it is cancelled"

"""What a command imports: most of the time of a short one goes into that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbatch.models_db.session import Database
from tests.rows import a_batch

_NOT_NEEDED = {"alembic", "celery", "kombu", "redis", "flower", "rich", "torch", "transformers", "huggingface_hub"}
_PROGRAM = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, sep="\\n", file=sys.stderr))
from qbatch.cli import main
main(sys.argv[1:])
"""


def imported(database: Database, home: Path, *command: str) -> set[str]:
    url = database.engine.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *command],
        env=os.environ | {"QBATCH_HOME": str(home), "QBATCH_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("status", "b1"),
        ("jobs",),
        ("results",),
        ("workers",),
        ("submit", "--models", "list", "--bits", "4"),
        ("plan", "--models", "list", "--bits", "4"),
    ],
    ids=" ".join,
)
def test_a_short_command_imports_neither_the_stack_nor_another_database(
    database: Database, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """``submit`` where no stack runs, and with one no more until it sends."""
    a_batch(database)
    models = tmp_path / "list"
    models.write_text("organization/model\n")
    modules = imported(database, tmp_path / "home", *(str(models) if word == "list" else word for word in command))
    others = "postgresql" if database.is_sqlite else "sqlite"
    assert modules & {*_NOT_NEEDED, f"sqlalchemy.dialects.{others}"} == set()
    assert "qbatch.models_db.tables" in modules


def test_a_submit_of_hub_models_imports_what_it_stores_alone(database: Database, tmp_path: Path) -> None:
    models = tmp_path / "list"
    models.write_text("organization/model\n")
    modules = imported(database, tmp_path / "home", "submit", "--models", str(models), "--bits", "4")
    unused = {"qbatch.models_db.jobs", "qbatch.core.measured.measurement", "qbatch.core.loaders.known_loaders"}
    assert modules & unused == set()
    assert "qbatch.models_db.arrivals" in modules


@pytest.mark.parametrize("command", ["status", "jobs", "workers"])
def test_a_list_of_what_waits_imports_no_other_command(database: Database, tmp_path: Path, command: str) -> None:
    a_batch(database)
    modules = imported(database, tmp_path / "home", command)
    commands = {name for name in modules if name.startswith("qbatch.commands.")}
    shared = {"completion", "context", "lazy_commands", "shared_options", "targets", "unserved"}
    assert {name.rpartition(".")[2] for name in commands} == {"queue_state", *shared}
    assert modules & {"qbatch.core.measured.measurement"} == set()

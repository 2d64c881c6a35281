"""A job's state, and the columns that say which message stands for it, are written in one place each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import qbatch

PACKAGE = Path(qbatch.__file__).parent


def modules() -> Iterator[Path]:
    for folder in PACKAGE.iterdir():
        if folder.is_dir():
            yield from (path for path in folder.rglob("*.py") if "migrations" not in path.parts)


def updates_job(node: ast.Call) -> bool:
    """``update(Job)….values(…)``"""
    inner = node.func
    while isinstance(inner, ast.Attribute | ast.Call):
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "update":
            return any(isinstance(argument, ast.Name) and argument.id == "Job" for argument in inner.args)
        inner = inner.value if isinstance(inner, ast.Attribute) else inner.func
    return False


def writes(tree: ast.Module, column: str) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and updates_job(node) and any(word.arg == column for word in node.keywords):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign) else targets
        if any(isinstance(t, ast.Attribute) and t.attr == column and ast.unparse(t.value) == "job" for t in targets):
            return True
    return False


@pytest.mark.parametrize(
    ("column", "writers"),
    [
        ("state", {"claiming.py", "transitions.py", "user_requests.py"}),
        ("attempt", {"claiming.py"}),
        ("failures", {"carry_out.py", "user_requests.py"}),
        ("work_started", {"claiming.py"}),
        ("lease_expires_at", {"claiming.py", "holding.py", "transitions.py", "user_requests.py"}),
        ("dispatch_id", {"window.py"}),
    ],
)
def test_who_writes_a_jobs_row(column: str, writers: set[str]) -> None:
    found = {path for path in modules() if writes(ast.parse(path.read_text(encoding="utf-8")), column)}
    assert {path.name for path in found} == writers
    assert {path.parent.name for path in found if column != "dispatch_id"} <= {"jobs"}


def test_jobs_are_read_through_the_filter_of_arriving_batches() -> None:
    """Those of the ORM, in a session of ``Database``. A plain statement would see a batch that is half stored."""
    past_it = {
        path.name
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in {"__table__", "tables"})
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in {"text", "Session", "session.connection"})
    }
    # The filter itself, the insertion of jobs, a default, and what reads only the schema, statistics or the server.
    others = {"schema.py", "schema_fit.py", "schema_state.py", "session.py", "query_statistics.py", "connections.py"}
    assert past_it <= {"arrival_filter.py", "batches.py", "tables.py"} | others

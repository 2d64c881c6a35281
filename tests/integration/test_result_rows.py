"""The SQL view of the results says on both databases what ``results --json`` and ``compare --json`` say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from qbatch.core.measured.metrics import DECODE, DISK, WEIGHTS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.recovery import ADAPTER_MARK
from qbatch.models_db import jobs, results
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Arrival, Checkpoint, Job, Result
from qbatch.views.ratios import may_compare, ratio_of
from tests.measured_batch import measured_batch
from tests.rows import a_batch, a_worker, bundle, claim

DOCUMENT = Path(__file__).parents[2] / "docs" / "howto" / "query-results.md"
_NOT_IN_THE_VIEW = {"not_measured", "mixture"}
_JSON = ("options", "protocol", "details")


@pytest.fixture
def filled(database: Database) -> Database:
    """A measured batch, one whose jobs have its results, and one that waits."""
    measured_batch(database)
    worker = a_worker(database)
    _, later = a_batch(database, bundle("meta-llama/Meta-Llama-3.1-8B-Instruct"))
    tokens = sorted(claim(database, later, worker))
    with database.write() as session:
        for token, earlier in zip(tokens, (1, 3, 2), strict=True):
            assert jobs.answer(session, token, earlier)
    a_batch(database)
    return database


_ALL = "SELECT * FROM result_rows ORDER BY job_number"


def viewed(database: Database, query: str = _ALL) -> list[dict[str, Any]]:
    with database.engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def shown(database: Database) -> list[ResultRow]:
    with database.read() as session:
        return results.find_results(session)


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """SQLite gives JSON as text, and a boolean as a number."""
    found = {name: json.loads(row[name]) if isinstance(row[name], str) else row[name] for name in _JSON}
    return {**row, **found, "double_quant": bool(row["double_quant"])}


def test_each_row_is_that_of_results_json(filled: Database) -> None:
    rows, expected = [as_json(row) for row in viewed(filled)], shown(filled)
    assert len(rows) == len(expected) == 30
    for row, result in zip(rows, expected, strict=True):
        for name, value in result.to_json().items():
            if name in _NOT_IN_THE_VIEW or (name in _JSON and not result.protocol.is_known and name != "options"):
                continue
            assert row[name] == (pytest.approx(value) if isinstance(value, float) else value), (result.job_id, name)


def test_ratios_are_those_of_compare(filled: Database) -> None:
    expected = {row.job_id: row for row in shown(filled)}
    compared = 0
    for row in viewed(filled):
        result = expected[row["job_id"]]
        baseline = expected.get(result.baseline_job_id or "")
        for metric in (WEIGHTS, DISK, DECODE):
            fair = baseline is not None and may_compare(result, baseline, on_device=metric.on_device)
            ratio = ratio_of(metric, result, baseline) if fair else None
            assert row[f"{metric.key}_ratio"] == (None if ratio is None else pytest.approx(ratio))
            compared += ratio is not None
    assert compared > 50


def test_the_standard_error_and_the_times_stand_beside(filled: Database) -> None:
    (row,) = viewed(filled, "SELECT * FROM result_rows WHERE job_number = 3")
    (result,) = [one for one in shown(filled) if one.job_id == "j3"]
    assert row["kl_mean_se"] == pytest.approx(result.details.quality.kl_mean_se)
    assert row["finished_at"] is not None
    assert len(viewed(filled, "SELECT * FROM result_rows WHERE batch_number = 2")) == 3


def test_nobody_can_write_through_it(filled: Database) -> None:
    for statement in (
        "UPDATE result_rows SET state = 'queued'",
        "DELETE FROM result_rows",
        "INSERT INTO result_rows (job_id) VALUES ('j1')",
    ):
        with pytest.raises(DBAPIError), filled.engine.begin() as connection:
            connection.execute(text(statement))
    assert len(viewed(filled)) == 30


def test_a_batch_that_is_still_being_stored_is_not_there(filled: Database) -> None:
    with filled.write() as session:
        session.add(Arrival(batch_id=3))
    assert {row["batch_id"] for row in viewed(filled)} == {"b1", "b2"}


def test_two_baselines_of_unlike_dtypes_are_each_their_own(database: Database) -> None:
    _, ids = a_batch(database, bundle("/models/a"), bundle("/models/a"))
    with database.write() as session:
        for job in session.scalars(select(Job).where(Job.id.in_(ids[:3]))):
            job.dtype = "float32"
    said = {row["job_id"]: row["baseline_job_id"] for row in viewed(database)}
    assert said == {row.job_id: row.baseline_job_id for row in shown(database)}


def test_each_query_of_the_document_has_an_answer(filled: Database) -> None:
    queries = re.findall("```sql\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    smallest, by_scheme, failed = (viewed(filled, query) for query in queries)
    assert {row["scheme"] for row in smallest} == {"bnb-nf4", "bnb-int8"}
    assert [row["scheme"] for row in by_scheme] == ["bnb-int8", "bnb-nf4"]
    assert failed == [{"error_kind": "cuda_oom", "jobs": 1, "example": "j23"}]


def test_every_column_of_the_view_is_one_of_json_or_in_the_document(filled: Database) -> None:
    (row, *_) = viewed(filled)
    documented = set(re.findall("`([a-z_]+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert row.keys() - set(ResultRow.written_order()) <= documented
    assert set(ResultRow.written_order()) - row.keys() == _NOT_IN_THE_VIEW


def test_the_rows_of_a_batch_are_found_by_indexes(sqlite_database: Database) -> None:
    measured_batch(sqlite_database)
    plan = viewed(sqlite_database, "EXPLAIN QUERY PLAN SELECT * FROM result_rows WHERE batch_number = 1")
    scans = [step["detail"] for step in plan if "SCAN" in str(step["detail"])]
    assert [scan for scan in scans if "ix_checkpoints_gone" not in scan] == [], "of few rows alone"


@pytest.mark.parametrize("adapter", ["", f"{ADAPTER_MARK}svd-r16"], ids=["itself", "what its adapter belongs to"])
def test_a_checkpoint_that_is_gone_has_no_path(filled: Database, adapter: str) -> None:
    (row,) = [one for one in shown(filled) if one.job_id == "j3"]
    with filled.write() as session:
        session.add(Checkpoint(key="k" * 64, path=row.checkpoint_path, root_sha256="", disk_bytes=1, gone_at=db_now()))
        with_adapter = (
            update(Result).where(Result.job_id == 3).values(checkpoint_path=f"{row.checkpoint_path}{adapter}")
        )
        session.execute(with_adapter)
    said = {one["job_id"]: one["checkpoint_path"] for one in viewed(filled)}
    assert said["j3"] is None
    assert said == {one.job_id: one.checkpoint_path for one in shown(filled)}

"""A page of jobs or results has what a list of all begins with."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, update

from qbatch.core.domain import JobState, Method
from qbatch.core.measured.result_row import ResultRow
from qbatch.models_db import jobs, model_jobs, model_pages, results
from qbatch.models_db.job_pages import count_jobs, first_jobs
from qbatch.models_db.listing import list_batches, list_jobs
from qbatch.models_db.model_pages import results_by_model, results_of_first_models
from qbatch.models_db.result_filter import ResultFilter
from qbatch.models_db.session import VALUES_AT_ONCE, Database
from qbatch.models_db.tables import Job, Result
from tests.rows import a_batch, a_worker, bundle, claim, succeed


def names(rows: Sequence[ResultRow]) -> list[tuple[str, str | None]]:
    return [(row.job_id, row.baseline_job_id) for row in rows]


@pytest.fixture(params=[True, False], ids=["read by batch", "read by model"])
def measured(database: Database, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Two batches of four models. Of the first, each second job has a result; one of the second has the first's."""
    monkeypatch.setattr(model_jobs, "_have_fewer_jobs", lambda *_: request.param)
    worker = a_worker(database)
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(4)])
    tokens = claim(database, ids[::2], worker)
    for token in tokens:
        assert succeed(database, token)
    _, later = a_batch(database, *[bundle(f"/models/{n}") for n in range(4)])
    (token,) = claim(database, later[1:2], worker)
    with database.write() as session:
        for number, job_id in enumerate(sorted(job_id for job_id, _ in tokens)):
            figures = {"kl_mean": (0.3, None, 0.1, 0.3)[number % 4], "disk_bytes": 10 * (number % 3)}
            session.execute(update(Result).where(Result.job_id == job_id).values(**figures))
        assert jobs.answer(session, token, ids[0])
    return [*ids, *later]


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("batch_ids", [[], [1], [2, 1]])
def test_each_model_has_all_of_its_rows_in_one_part(
    database: Database, monkeypatch: pytest.MonkeyPatch, batch_ids: list[int]
) -> None:
    monkeypatch.setattr(model_pages, "_MODELS_AT_ONCE", 3)
    with database.read() as session:
        parts = list(results_by_model(session, batch_ids=batch_ids))
        every = results.find_results(session, batch_ids=batch_ids)
    assert [len({row.model for row in rows}) for rows in parts] == [3, 1]
    assert {row.model for row in parts[0]}.isdisjoint(row.model for row in parts[1])
    assert sorted(names([row for rows in parts for row in rows])) == sorted(names(every))


def test_however_many_pages_each_batch_is_asked_about_once(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the jobs of each state. With two batches whose jobs alternate, as two submits at once store them."""
    monkeypatch.setattr(model_pages, "VALUES_AT_ONCE", 6)
    batches = 8
    for _ in range(batches):
        a_batch(sqlite_database, *[bundle(f"/models/{n}") for n in range(5)])
    with sqlite_database.write() as session:
        session.execute(update(Job).where(Job.batch_id <= 2).values(batch_id=1 + Job.id % 2))
    sent: list[str] = []
    event.listen(sqlite_database.engine, "before_cursor_execute", lambda *of: sent.append(of[2]))
    with sqlite_database.read() as session:
        rows = [row for part in results_by_model(session, batch_ids=range(1, batches + 1)) for row in part]
    assert len({row.job_id for row in rows}) == len(rows) == 15 * batches
    pages = [statement for statement in sent if "ORDER BY jobs.id" in statement and "LIMIT" in statement]
    assert len(pages) == batches * len(JobState)


@pytest.mark.usefixtures("measured")
def test_a_page_of_results_is_the_beginning_of_all(database: Database) -> None:
    sorts = (None, "kl_mean", "-kl_mean", "disk_bytes", "-disk_bytes", "model", "-bits", "state")
    chosen: tuple[dict[str, Any], ...] = (
        {},
        {"batch_ids": [1]},
        {"batch_ids": [2, 1]},
        {"only": ResultFilter(models=["/1"], bits=[4])},
        {"only": ResultFilter(models=["*/?"], max_kl=0.2)},
        {"only": ResultFilter(states=["succeeded"], max_weights_bytes=10, devices=["A cpu"]), "batch_ids": [1]},
    )
    with database.read() as session:
        for sort, which in itertools.product(sorts, chosen):
            rows = names(results.find_results(session, sort=sort, **which))
            for limit in (1, 3, 5, 7, 100):
                page = names(results.find_results(session, sort=sort, limit=limit, **which))
                assert page == rows[:limit], (sort, which, limit)


@pytest.mark.usefixtures("measured")
def test_a_page_of_models_has_all_rows_of_the_first_ones(database: Database) -> None:
    """Also those that another batch added to a model later."""
    with database.read() as session:
        for batches, only in (((), ResultFilter()), ([2], ResultFilter()), ([2, 1], ResultFilter(models=["*/?"]))):
            rows = results.find_results(session, batch_ids=batches, only=only)
            models = list(dict.fromkeys(row.model for row in rows))
            for most in (1, 2, 3, 4, 50, None):
                page = results_of_first_models(session, most, batch_ids=batches, only=only)
                shown = models[:most]
                assert names(page.rows) == names([row for row in rows if row.model in shown])
                assert page.has_more == (len(models) > len(shown))


def test_a_page_of_jobs_is_the_beginning_of_all(database: Database, measured: list[int]) -> None:
    with database.read() as session:
        for batches in ((), (1,), (2, 1)):
            for states in ((), ("queued",), ("succeeded", "queued"), ("failed",)):
                rows = list_jobs(session, batch_ids=batches, states=states)
                assert list_jobs(session, batch_ids=batches, states=states, limit=4) == rows[:4]
                assert count_jobs(session, batch_ids=batches, states=states) == len(rows)
        assert first_jobs(session, 100) == measured
        page, every = list_batches(session, limit=1), list_batches(session)
        assert [batch | {"elapsed_s": 0} for batch in page] == [batch | {"elapsed_s": 0} for batch in every[1:]]


def test_each_row_of_many_models_has_its_baseline(sqlite_database: Database) -> None:
    """Baselines are looked for by model, and of more models than a statement takes, by batch."""
    _, ids = a_batch(sqlite_database, *[bundle(f"/m/{n}", Method.NONE, Method.NF4) for n in range(VALUES_AT_ONCE + 1)])
    baselines = {f"j{quantized}": f"j{baseline}" for baseline, quantized in zip(ids[::2], ids[1::2], strict=True)}
    with sqlite_database.read() as session:
        for limit in (None, 2 * len(ids), VALUES_AT_ONCE):
            rows = results.find_results(session, limit=limit)
            assert {row.job_id: row.baseline_job_id for row in rows if not row.is_baseline} == {
                job: baseline for job, baseline in baselines.items() if job in {row.job_id for row in rows}
            }


# What a command shows


@pytest.fixture
def home(sqlite_database: Database, tmp_path: Path) -> Path:
    """Sixty batches of a job each; that of the first has failed."""
    for n in range(60):
        a_batch(sqlite_database, bundle(f"/models/{n}", Method.NF4))
    with sqlite_database.write() as session:
        first = session.scalars(select(Job).order_by(Job.id).limit(1)).one()
        first.state = JobState.FAILED
    return tmp_path


def run(home: Path, *arguments: str, terminal: bool = False) -> tuple[str, str]:
    """Standard output and error of a command; standard output is a terminal or a pipe."""
    reader, writer = os.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "qbatch", *arguments],
        env=os.environ | {"QBATCH_HOME": str(home), "COLUMNS": "300"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    said = b"".join(iter(lambda: _read(reader), b""))
    os.close(reader)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0, complaints
    return said.decode().replace("\r\n", "\n"), complaints


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except OSError:  # how Linux ends a terminal of which the other side is closed
        return b""


def test_a_terminal_gets_a_screenful_and_is_told_of_the_rest(home: Path) -> None:
    said, complaints = run(home, "jobs", terminal=True)
    assert [line.split()[0] for line in said.splitlines()[2:52]] == [f"j{n}" for n in range(1, 51)]
    assert said.splitlines()[52:] == ["", "j1: of an unknown reason"]
    assert "the first 50 of 60 jobs; --limit 60 shows all" in complaints
    said, complaints = run(home, "status", terminal=True)
    assert [line.split()[0] for line in said.splitlines()[2:]] == [f"b{n}" for n in range(11, 61)]
    assert "the newest 50 of 60 batches; --limit 60 shows all" in complaints
    said, complaints = run(home, "compare", terminal=True)
    assert "/models/49 " in said
    assert "/models/50 " not in said
    assert "these are the first 50 models; a larger --limit shows more" in complaints


def test_a_program_gets_all_unless_it_asks_for_less(home: Path) -> None:
    assert len(json.loads(run(home, "jobs", "--json")[0])) == 60
    assert len(json.loads(run(home, "jobs", "--json", terminal=True)[0])) == 60
    assert len(list(csv.DictReader(io.StringIO(run(home, "status", "--format", "csv")[0])))) == 60
    said, complaints = run(home, "jobs", "--json", "--state", "queued", "--limit", "2")
    assert [job["job_id"] for job in json.loads(said)] == ["j2", "j3"]
    assert "the first 2 of 59 jobs; --limit 59 shows all" in complaints
    assert "--limit" not in run(home, "jobs", "--state", "failed", "--limit", "2")[1]


def test_a_batch_of_many_jobs_shows_the_first(sqlite_database: Database, tmp_path: Path) -> None:
    a_batch(sqlite_database, *[bundle(f"/models/{n}", Method.NF4) for n in range(60)])
    said, complaints = run(tmp_path, "status", "b1", terminal=True)
    assert len(said.splitlines()) == 3 + 1 + 52
    assert "50 of 60 jobs" in complaints

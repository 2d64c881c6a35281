"""``qbatch doctor`` reports what is wrong, and nothing if all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import CudaOom, DeviceError
from qbatch.core.settings import Settings
from qbatch.models_db.database_clock import db_now
from qbatch.models_db.leases import acquire
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import SCHEMA_HEAD, Database
from qbatch.models_db.tables import Pause, Worker
from qbatch.views.checks import Check, State, render_checks
from qbatch.views.doctor import broker_place, examine
from qbatch.views.libraries import VisibleGpu, cuda, examine_libraries, versions
from tests.migrating import AFTER_NEXT, INDEX, NEXT, NULLABLE, migrate
from tests.rows import a_batch, a_worker, bundle, claim, fail


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"QBATCH_HOME": str(tmp_path / "home")})


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.sqlalchemy_url)
    upgrade(database)
    yield database
    database.dispose()


def examined(settings: Settings, *, stack_runs: bool = False) -> dict[str, Check]:
    return {check.check: check for check in examine(settings, gpus=(), stack_runs=stack_runs)}


def wrong(settings: Settings, *, stack_runs: bool = False) -> dict[str, str]:
    found = examined(settings, stack_runs=stack_runs).values()
    return {check.check: check.message for check in found if check.state is State.WRONG}


def test_a_fresh_installation_is_well_and_stays_untouched(settings: Settings) -> None:
    found = examined(settings)
    assert {check.state for check in found.values()} <= {State.OK, State.NOTE}
    assert found["torch"].state is State.OK
    assert "created when it is first needed" in found["database"].message
    assert "`qbatch up` starts one" in found["broker"].message
    assert not settings.home.exists()


def test_an_idle_home_is_well(settings: Settings, database: Database) -> None:
    assert wrong(settings) == {}
    assert "schema" in examined(settings)["database"].message


def test_jobs_that_nobody_can_run_are_a_fault(settings: Settings, database: Database) -> None:
    a_batch(database)
    found = wrong(settings)
    assert found.keys() == {"scheduler", "workers"}
    assert "jobs are waiting" in found["workers"]
    a_worker(database)
    with database.write() as session:
        acquire(session, "scheduler", "host:1", 60.0)
    assert wrong(settings) == {}
    assert examined(settings)["scheduler"].message == "host:1 is active"
    assert examined(settings)["jobs"].message == "3 queued"
    a_batch(database, bundle(device=DeviceKind.CUDA))
    assert wrong(settings)["devices"].startswith("b2 needs a GPU, and no live worker has one")


def test_a_quarantined_worker_is_named_with_its_reason(settings: Settings, database: Database) -> None:
    worker_id = a_worker(database, "gpu0@a")
    _, job_ids = a_batch(database)
    for job_id in job_ids[:2]:
        (token,) = claim(database, [job_id], worker_id)
        fail(database, token, DeviceError("an illegal memory access"))
    assert wrong(settings)["gpu0@a"] == ("quarantined: two device errors in a row; the last: an illegal memory access")


def test_a_silent_worker_is_a_note_while_it_is_news(settings: Settings, database: Database) -> None:
    for name, offset_s in (("today", -600.0), ("long ago", -90_000.0)):
        worker_id = a_worker(database, name)
        with database.write() as session:
            session.get_one(Worker, worker_id).heartbeat_at = db_now(offset_s)
    found = examined(settings)
    assert "silent since" in found["today"].message
    assert found["today"].state is State.NOTE
    assert "long ago" not in found


def test_failures_of_a_day_are_counted_by_kind(settings: Settings, database: Database) -> None:
    worker_id = a_worker(database)
    _, job_ids = a_batch(database)
    tokens = claim(database, job_ids, worker_id)
    for token in tokens[:2]:
        fail(database, token, CudaOom("no room"))
    assert examined(settings)["failures"].message == "in the last 24 hours: 2 cuda_oom"


def test_a_pause_is_a_fault_until_it_ends(settings: Settings, database: Database) -> None:
    now = datetime.now(UTC)
    with database.write() as session:
        session.add(Pause(reason="disk", message="the disk is full", until=now + timedelta(hours=1)))
        session.add(Pause(reason="old", message="was full", until=now - timedelta(hours=1)))
    found = wrong(settings)
    assert list(found) == ["pause"]
    assert found["pause"].endswith(": the disk is full")


def test_services_that_do_not_answer_are_named_without_their_passwords(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {
            "QBATCH_HOME": str(tmp_path),
            "QBATCH_BROKER_URL": "redis://user:canary-secret@127.0.0.1:1/3",
            "QBATCH_DATABASE_URL": "postgresql://user:canary-secret@127.0.0.1:1/qbatch",
        }
    )
    found = wrong(settings)
    assert found["broker"] == "redis://127.0.0.1:1/3 does not answer (ConnectionError)"
    assert "does not answer" in found["database"]
    assert "canary-secret" not in str(found)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("rediss://:secret@[::1]:6380/0", "rediss://[::1]:6380/0"),
        ("redis+socket:///run/redis.sock?virtual_host=0", "redis+socket:///run/redis.sock"),
    ],
)
def test_a_broker_s_place_holds_no_secret(settings: Settings, url: str, place: str) -> None:
    assert broker_place(Settings.from_env({"QBATCH_BROKER_URL": url})) == place


@pytest.mark.parametrize("stack_runs", [False, True])
def test_a_socket_folder_of_somebody_else_is_named(settings: Settings, stack_runs: bool) -> None:
    settings.home.mkdir()
    place = settings.socket_dir
    place.mkdir(mode=0o755)
    settings.socket_link.symlink_to(place)
    try:
        place.chmod(0o755)
        said = wrong(settings, stack_runs=stack_runs)["broker"]
        assert said.startswith(f"{place} is open to others (mode 0755), and Redis needs it for its socket: ")
    finally:
        place.rmdir()


def test_an_old_postgresql_schema_is_a_fault_that_says_the_remedy(
    tmp_path: Path, postgresql_url: str, postgresql_database: Database
) -> None:
    from sqlalchemy import text

    settings = Settings.from_env({"QBATCH_HOME": str(tmp_path), "QBATCH_DATABASE_URL": postgresql_url})
    assert "database" not in wrong(settings)
    with postgresql_database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert "run `qbatch db upgrade`" in wrong(settings)["database"]


def test_outcomes_that_wait_are_a_note_and_those_set_aside_a_fault(settings: Settings, database: Database) -> None:
    assert "spool" not in examined(settings)
    settings.spool.mkdir(parents=True)
    (settings.spool / "7-1.json").write_text("{}")
    assert examined(settings)["spool"].message.endswith("has yet to record: 1")
    (settings.spool / "9-2.rejected").write_text("{}")
    assert "9-2.rejected could not be recorded" in wrong(settings)["spool"]


def test_a_newer_schema_is_a_fault_unless_its_migrations_allow_ours(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    migrate(database, tmp_path, (SCHEMA_HEAD, INDEX))
    assert "database" not in wrong(settings)
    assert f"schema {NEXT}, newer than this qbatch's" in examined(settings)["database"].message
    migrate(database, tmp_path, (SCHEMA_HEAD, INDEX), (AFTER_NEXT, NULLABLE))
    assert "of a newer qbatch" in wrong(settings)["database"]
    assert "update qbatch" in wrong(settings)["database"]


def test_a_folder_in_the_way_of_a_file_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings.from_env(
        {"QBATCH_HOME": str(tmp_path / "home"), "QBATCH_STORAGE": str(tmp_path / "file" / "x")}
    )
    assert "cannot be written" in wrong(settings)["storage"]


def test_a_library_that_is_too_old_or_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real: Callable[[str], str] = metadata.version

    def other(name: str) -> str:
        if name == "celery":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.9.1+cpu", "torchao": "0.17.0"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", other)
    found = {check.check: check for check in versions()}
    assert found["torch"].state is State.WRONG
    assert found["torch"].message.startswith("2.9.1+cpu; qbatch needs >=2.1")
    assert (found["celery"].state, found["celery"].message) == (State.WRONG, "is not installed")
    assert found["transformers"].state is State.OK
    assert (found["torchao"].state, found["torchao"].message) == (State.WRONG, "0.17.0; qbatch needs >=0.18")
    gpu = cuda([VisibleGpu(name="NVIDIA H200", memory_bytes=141 * 2**30)])
    assert (gpu.state, gpu.message.split("; ")[1]) == (
        State.WRONG,
        "but the installed torch is built without CUDA",
    )


@pytest.mark.slow
def test_the_libraries_are_tried_by_quantizing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = list(examine_libraries())
    assert [check.state for check in found] == [State.OK] * len(found)
    assert "on cpu is restored to within" in found[0].message
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (broken,) = examine_libraries()
    assert broken.state is State.WRONG
    assert "libcudart.so is missing" in broken.message


def test_every_check_is_a_line() -> None:
    checks = [Check(check="gpu", state=State.NOTE, message="none")]
    assert render_checks(checks, "table").splitlines()[2].split() == ["gpu", "note", "none"]
    assert '"state": "note"' in render_checks(checks, "json")


def test_ready_workers_are_named(settings: Settings, database: Database) -> None:
    a_worker(database)
    assert examined(settings)["workers"].message == "1 ready: w1"

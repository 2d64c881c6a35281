"""An outcome is recorded, or spooled and recorded later; never lost, never counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from qbatch.core.domain import DeviceKind, JobState
from qbatch.core.errors import DatabaseUnreachable, ForeignSchema, QuantizationError, SourceCorrupt, WorkerLost
from qbatch.core.retry_policy import RetryLimits
from qbatch.core.settings import Settings
from qbatch.models_db import jobs
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Checkpoint, Result
from qbatch.worker.checkpoints.published import Published
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.spool import SPOOL_VERSION
from tests.migrating import NEXT, NOT_NULL, fill_the_new_column, migrate
from tests.rows import POLICY, PROTOCOL, a_batch, a_job, a_worker, bundle, claim, measured, states
from tests.unprivileged import without_rights

ADDRESS = PROTOCOL.for_device(DeviceKind.CPU)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache", backoff_s=0.01)


@pytest.fixture
def cut_off(settings: Settings) -> Recorder:
    """A recorder whose database does not answer."""
    return Recorder(Database("postgresql://nobody@127.0.0.1:1/none"), settings)


def published(key: str = "k" * 64, root: str = "r" * 64) -> Published:
    return Published(
        key=key, path="checkpoints/x", root_sha256=root, disk_bytes=7, audit={}, quantize_s=1.0, versions={"x": "1"}
    )


def succeed(recorder: Recorder, token: jobs.Token) -> None:
    recorder.succeed(token, measured(), ADDRESS, published())


def spooled(settings: Settings) -> list[str]:
    return sorted(path.name for path in settings.spool.iterdir()) if settings.spool.exists() else []


def results_of(database: Database) -> list[int]:
    with database.read() as session:
        return list(session.scalars(select(Result.job_id).order_by(Result.job_id)))


def test_an_outcome_goes_to_the_database_at_once(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database)
    first, second, third = claim(database, ids, a_worker(database))
    recorder = Recorder(database, settings)
    succeed(recorder, first)
    succeed(recorder, second)
    recorder.fail(third, QuantizationError("no"))
    assert [states(database)[token[0]] for token in (first, second, third)] == ["succeeded", "succeeded", "failed"]
    assert results_of(database) == sorted([first[0], second[0]])
    with database.read() as session:
        (row,) = session.scalars(select(Checkpoint)).all()
        assert (row.key, row.path, row.disk_bytes) == ("k" * 64, "checkpoints/x", 7)
    assert spooled(settings) == []


def test_while_the_database_is_away_outcomes_are_spooled_for_later(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(database)
    good, bad, lost = claim(database, ids, a_worker(database))
    succeed(cut_off, good)
    cut_off.fail(bad, QuantizationError("a tensor of NaN"))
    cut_off.fail(lost, WorkerLost("gone"))
    assert spooled(settings) == sorted(f"{job_id}-{attempt}.json" for job_id, attempt in (good, bad, lost))
    with pytest.raises(DatabaseUnreachable):
        cut_off.replay()
    assert len(spooled(settings)) == 3, "nothing is lost by trying"
    Recorder(database, settings).replay()
    assert spooled(settings) == []
    assert a_job(database, good[0]).state == JobState.SUCCEEDED
    failed = a_job(database, bad[0])
    assert (failed.state, failed.error_kind, failed.error_message) == (
        "failed",
        "quantization_error",
        "a tensor of NaN",
    )
    again = a_job(database, lost[0])
    assert (again.state, again.failures) == (JobState.QUEUED, 1)


def test_a_hand_back_is_spooled_too(database: Database, settings: Settings, cut_off: Recorder) -> None:
    _, ids = a_batch(database)
    first, second, _ = claim(database, ids, a_worker(database))
    cut_off.hand_back([first, second], alone=True)
    Recorder(database, settings).replay()
    assert spooled(settings) == []
    jobs_of_it = [a_job(database, token[0]) for token in (first, second)]
    assert [(job.state, job.failures) for job in jobs_of_it] == [("queued", 0)] * 2
    assert jobs_of_it[0].bundle != jobs_of_it[1].bundle


def test_an_outcome_is_kept_in_memory_while_no_disk_accepts_it(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    """An embedded database and the spool share a disk: when it is full, neither takes anything."""
    _, ids = a_batch(database)
    first, second, _ = claim(database, ids, a_worker(database))
    settings.spool.parent.write_text("no folder can be made here")
    succeed(cut_off, first)
    cut_off.fail(second, QuantizationError("no"))
    with pytest.raises(DatabaseUnreachable):
        cut_off.replay()
    settings.spool.parent.unlink()
    for _ in range(2):
        with pytest.raises(DatabaseUnreachable):
            cut_off.replay()
    assert len(spooled(settings)) == 2, "there is room again, and the database is still away"
    Recorder(database, settings).replay()
    assert [a_job(database, token[0]).state for token in (first, second)] == ["succeeded", "failed"]
    assert spooled(settings) == []


def test_an_outcome_in_memory_is_recorded_once_the_database_answers(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    settings.spool.parent.write_text("no folder can be made here")
    recorder = Recorder(database, settings)
    with monkeypatch.context() as away:
        away.setattr(recorder, "_database", Database("postgresql://nobody@127.0.0.1:1/none"))
        succeed(recorder, token)
    assert a_job(database, token[0]).state == JobState.RUNNING
    for _ in range(2):
        recorder.replay()
    assert a_job(database, token[0]).state == JobState.SUCCEEDED
    assert results_of(database) == [token[0]]


def test_a_spooled_result_counts_although_the_lease_ran_out(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"))
    token, *_ = claim(database, ids, worker)
    succeed(cut_off, token)
    with database.write() as session:
        jobs.expire(session, **POLICY, worker_id=worker)
    Recorder(database, settings).replay()
    assert a_job(database, token[0]).state == JobState.SUCCEEDED


@pytest.mark.parametrize("ending", ["lost", "failed", "cancelled"])
def test_a_spooled_result_counts_where_the_job_was_lost_for_lack_of_it(
    database: Database, settings: Settings, cut_off: Recorder, ending: str
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database, bundle("/models/a"))
    token, *_ = claim(database, ids, worker)
    succeed(cut_off, token)
    with database.write() as session:
        jobs.note(session, token, work_started=True)
        if ending == "lost":
            jobs.expire(session, limits=RetryLimits(backoff_s=0.01, max_failures=1), worker_id=worker)
        elif ending == "failed":
            jobs.fail(session, token, SourceCorrupt("no"), lease_s=60.0, **POLICY)
        else:
            jobs.cancel(session, job_ids=[token[0]])
    ended = a_job(database, token[0])
    assert ended.state == (JobState.CANCELLED if ending == "cancelled" else JobState.FAILED)
    Recorder(database, settings).replay()
    job = a_job(database, token[0])
    assert job.state == (JobState.SUCCEEDED if ending == "lost" else ended.state)
    assert (job.error_kind is None) == (ending != "failed")
    assert len(results_of(database)) == (ending == "lost")


def test_a_spooled_outcome_does_not_touch_a_newer_attempt(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    worker = a_worker(database)
    _, ids = a_batch(database)
    stale = claim(database, ids, worker)
    succeed(cut_off, stale[0])
    cut_off.fail(stale[1], QuantizationError("no"))
    with database.write() as session:
        jobs.hand_back(session, stale)
    claim(database, ids, worker)
    Recorder(database, settings).replay()
    assert set(states(database).values()) == {JobState.RUNNING}
    assert results_of(database) == []
    assert spooled(settings) == []


def test_replaying_twice_is_harmless(database: Database, settings: Settings, cut_off: Recorder) -> None:
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    recorder = Recorder(database, settings)
    for _ in range(2):
        succeed(cut_off, token)
        recorder.replay()
    recorder.replay()
    assert results_of(database) == [token[0]]


def test_the_workers_of_a_machine_replay_one_spool_at_once(
    database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(5)])
    tokens = claim(database, ids, a_worker(database))
    for token in tokens:
        succeed(cut_off, token)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def replay() -> None:
        start.wait()
        try:
            Recorder(database, settings).replay()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=replay) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(states(database).values()) == {JobState.SUCCEEDED}
    assert spooled(settings) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("1-1", "{"), ("1-1", "{}"), ("1-1", '{"outcome": "failed", "kind": "no such kind", "message": ""}'), ("x", "{}")],
)
def test_an_unrecordable_outcome_is_set_aside(
    sqlite_database: Database, settings: Settings, cut_off: Recorder, name: str, content: str
) -> None:
    _, ids = a_batch(sqlite_database)
    token = claim(sqlite_database, ids, a_worker(sqlite_database))[2]
    settings.spool.mkdir(parents=True)
    (settings.spool / f"{name}.json").write_text(content)
    succeed(cut_off, token)
    Recorder(sqlite_database, settings).replay()
    assert spooled(settings) == [f"{name}.rejected"]
    assert a_job(sqlite_database, token[0]).state == JobState.SUCCEEDED


def test_a_result_that_a_newer_schema_does_not_take_waits_in_the_spool(
    database: Database, settings: Settings, tmp_path: Path, cut_off: Recorder
) -> None:
    """Whatever a newer version changed: its own worker records what ours measured."""
    _, ids = a_batch(database)
    good, bad, handed_back = claim(database, ids, a_worker(database))
    recorder = Recorder(database, settings)
    recorder.replay()
    with database.write() as session:
        jobs.note(session, good, work_started=True)
    migrate(database, tmp_path, (NEXT, NOT_NULL))
    succeed(recorder, good)
    recorder.fail(bad, QuantizationError("no"), published(key="b" * 64))
    assert not a_job(database, good[0]).work_started, "its lease may run out without a charge"
    for _ in range(3):
        with pytest.raises(ForeignSchema):
            recorder.replay()
    assert spooled(settings) == sorted(f"{job_id}-{attempt}.json" for job_id, attempt in (good, bad))
    assert a_job(database, good[0]).state == JobState.RUNNING
    recorder.hand_back([handed_back], alone=False)
    assert a_job(database, handed_back[0]).state == JobState.QUEUED, "the newer schema takes it"
    # The newer version, whose code fills the column.
    with database.write() as session:
        fill_the_new_column(session)
    Recorder(database, settings).replay()
    assert [a_job(database, token[0]).state for token in (good, bad)] == ["succeeded", "failed"]
    with database.read() as session:
        assert set(session.scalars(select(Checkpoint.key))) == {"k" * 64, "b" * 64}, "that of the failed one too"
    assert spooled(settings) == []


def test_a_column_that_somebody_added_by_hand_loses_no_result(
    postgresql_database: Database, settings: Settings
) -> None:
    database = postgresql_database
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    with database.write() as session:
        session.execute(text("ALTER TABLE results ADD COLUMN site TEXT NOT NULL"))
    recorder = Recorder(database, settings)
    succeed(recorder, token)
    for _ in range(2):
        with pytest.raises(ForeignSchema, match="the table results requires a value for site"):
            recorder.replay()
    assert spooled(settings) == [f"{token[0]}-{token[1]}.json"]
    with database.write() as session:
        session.execute(text("ALTER TABLE results DROP COLUMN site"))
    recorder.replay()
    assert a_job(database, token[0]).state == JobState.SUCCEEDED


def test_a_result_the_database_refuses_is_set_aside_and_the_job_says_where(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The schema is ours: it is the result that cannot be stored. It stops nobody, and is not thrown away."""
    _, ids = a_batch(database)
    refused, other, _ = claim(database, ids, a_worker(database))
    _constrain(database)
    recorder = Recorder(database, settings)
    succeed(recorder, refused)
    recorder.fail(other, QuantizationError("no"))
    assert spooled(settings) == [f"{refused[0]}-{refused[1]}.json"]
    recorder.replay()
    aside = settings.spool / f"{refused[0]}-{refused[1]}.rejected"
    assert spooled(settings) == [aside.name]
    job = a_job(database, refused[0])
    assert (job.state, job.error_kind) == ("failed", "internal_error")
    assert str(aside) in (job.error_message or "")
    assert "not here" in (job.error_message or "")
    assert str(aside) in caplog.text
    # Once the cause is mended, its name brings it back.
    _constrain(database, lift=True)
    aside.rename(aside.with_suffix(".json"))
    recorder.replay()
    assert a_job(database, refused[0]).state == JobState.SUCCEEDED
    assert results_of(database) == [refused[0]]


_REPLAY_TWICE = """
import sys
from pathlib import Path
from qbatch.models_db.session import Database
from qbatch.core.settings import Settings
from qbatch.worker.serving.recorder import Recorder

home = Path(sys.argv[1])
settings = Settings(home=home, storage=home / "storage", cache=home / "cache")
recorder = Recorder(Database(sys.argv[2]), settings)
recorder.replay()
recorder.replay()
"""


def test_a_read_only_spool_does_not_stop_a_worker(
    sqlite_database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(sqlite_database)
    refused, good, handed_back = claim(sqlite_database, ids, a_worker(sqlite_database))
    _constrain(sqlite_database)
    succeed(cut_off, refused)
    cut_off.fail(good, QuantizationError("no"))
    cut_off.hand_back([handed_back], alone=False)
    (settings.spool / "notes.json").write_text("not ours")
    before = spooled(settings)
    settings.spool.chmod(0o500)
    url = sqlite_database.engine.url.render_as_string()
    done = subprocess.run(
        [sys.executable, "-c", _REPLAY_TWICE, str(settings.home), url],
        env={"QBATCH_HOME": str(settings.home)},
        cwd=Path(__file__).parents[2],
        preexec_fn=without_rights(),
        capture_output=True,
        text=True,
    )
    settings.spool.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert spooled(settings) == before
    assert states(sqlite_database) == {refused[0]: "failed", good[0]: "failed", handed_back[0]: "queued"}
    assert str(settings.spool / f"{refused[0]}-{refused[1]}.json") in (
        a_job(sqlite_database, refused[0]).error_message or ""
    )
    said = [line for line in done.stderr.splitlines() if "Permission denied" in line]
    assert len(said) == len(before), "each once"


def _constrain(database: Database, *, lift: bool = False) -> None:
    """Have the database refuse every result, in words of its own."""
    with database.write() as session:
        if database.is_sqlite:
            session.execute(
                text(
                    "DROP TRIGGER refuse"
                    if lift
                    else "CREATE TRIGGER refuse BEFORE INSERT ON results BEGIN SELECT RAISE(ABORT, 'not here'); END"
                )
            )
        elif lift:
            session.execute(text("DROP TRIGGER refuse ON results"))
        else:
            session.execute(
                text(
                    "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger AS $$ BEGIN RAISE 'not here'; END $$"
                    " LANGUAGE plpgsql"
                )
            )
            session.execute(
                text("CREATE TRIGGER refuse BEFORE INSERT ON results FOR EACH ROW EXECUTE FUNCTION refuse()")
            )


def test_an_outcome_stays_in_memory_if_database_and_spool_fail(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database)
    token, *_ = claim(database, ids, a_worker(database))
    _constrain(database)
    settings.spool.parent.write_text("no folder can be made here")
    recorder = Recorder(database, settings)
    succeed(recorder, token)
    for _ in range(2):
        recorder.replay()
        assert recorder.lost() == [token[0]]
    _constrain(database, lift=True)
    recorder.replay()
    assert not recorder.has_in_memory
    assert a_job(database, token[0]).state == JobState.SUCCEEDED


# What each version has spooled, word for word: the next one reads them all.
_MEASURED = {
    "device_name": "a CPU", "dtype": "bfloat16", "compute_dtype": "bfloat16", "num_parameters": 10,
    "quantized_fraction": 0.5, "bits_per_param": 8.0, "disk_bytes": 10, "memory_footprint_bytes": 10,
    "weights_bytes": 10, "max_allocated_bytes": None, "load_model_s": 1.5, "quantize_s": None, "prefill_s_p50": None,
    "decode_tokens_per_s": None, "per_token_s_p50": None, "per_token_s_p99": None, "forward_s_p50": None,
    "forward_samples_per_s": None, "perplexity": None, "kl_mean": None, "top1_agreement": None,
    "details": {"task": "causal-lm"},
}  # fmt: skip
_PROTOCOL = {
    "eval_text_sha256": "0" * 64, "eval_window": 256, "eval_stride": 256, "eval_max_windows": 8, "batch_size": 1,
    "prompt_tokens": 64, "new_tokens": 16, "warmup_iterations": 1, "min_iterations": 2, "min_duration_s": 0.5,
}  # fmt: skip
_CHECKPOINT = {"key": "k" * 64, "path": "checkpoints/x", "root_sha256": "r" * 64, "disk_bytes": 7}
_SPOOLED: list[dict[str, Any]] = [
    {"outcome": "succeeded", "measurement": _MEASURED, "protocol": _PROTOCOL, "checkpoint": _CHECKPOINT},
    {"outcome": "failed", "kind": "disk_full", "message": "no room", "needed_bytes": 5},
    {"outcome": "handed_back", "alone": True},
]


@pytest.mark.parametrize("version", range(SPOOL_VERSION + 1))
def test_the_spool_of_every_earlier_version_is_read(database: Database, settings: Settings, version: int) -> None:
    _, ids = a_batch(database)
    tokens = claim(database, ids, a_worker(database))
    database.require_schema()
    header = {"version": version, "database": database.identity} if version else {}
    settings.spool.mkdir(parents=True)
    for token, outcome in zip(tokens, _SPOOLED, strict=True):
        (settings.spool / f"{token[0]}-{token[1]}.json").write_text(json.dumps(header | outcome))
    Recorder(database, settings).replay()
    assert spooled(settings) == []
    found = [a_job(database, token[0]) for token in tokens]
    assert [job.state for job in found] == ["succeeded", "queued", "queued"]
    assert found[1].error_kind == "disk_full"


def test_the_spool_of_a_newer_version_is_left_alone(
    sqlite_database: Database, settings: Settings, cut_off: Recorder
) -> None:
    _, ids = a_batch(sqlite_database)
    newer, ours, _ = claim(sqlite_database, ids, a_worker(sqlite_database))
    name = f"{newer[0]}-{newer[1]}.json"
    settings.spool.mkdir(parents=True)
    (settings.spool / name).write_text(json.dumps({"version": SPOOL_VERSION + 1, "what": "of tomorrow"}))
    succeed(cut_off, ours)
    for _ in range(2):
        Recorder(sqlite_database, settings).replay()
    assert spooled(settings) == [name]
    assert [a_job(sqlite_database, token[0]).state for token in (newer, ours)] == ["running", "succeeded"]


def test_the_outcome_of_another_database_touches_no_job_of_this_one(tmp_path: Path, settings: Settings) -> None:
    """A home whose qbatch.db was deleted counts its jobs from 1 again, and its spool is where it was."""
    files = [tmp_path / "old.db", tmp_path / "new.db"]
    databases = [Database(f"sqlite:///{file}") for file in files]
    for database in databases:
        upgrade(database)
        database.require_schema()
        _, ids = a_batch(database)
        token, *_ = claim(database, ids, a_worker(database))
    assert databases[0].identity != databases[1].identity
    recorder = Recorder(databases[0], settings)
    files[0].rename(tmp_path / "moved.db")
    succeed(recorder, token)
    assert spooled(settings) == ["1-1.json"]
    Recorder(databases[1], settings).replay()
    assert a_job(databases[1], token[0]).state == JobState.RUNNING
    assert spooled(settings) == ["1-1.rejected"]
    for database in databases:
        database.dispose()


def test_two_workers_may_record_the_same_checkpoint_at_once(database: Database, settings: Settings) -> None:
    _, ids = a_batch(database, *[bundle(f"/models/{n}") for n in range(4)])
    tokens = claim(database, ids, a_worker(database))
    failures: list[BaseException] = []
    start = threading.Barrier(len(tokens))

    def record(token: jobs.Token) -> None:
        start.wait()
        try:
            succeed(Recorder(database, settings), token)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=record, args=(token,)) for token in tokens]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(states(database).values()) == {JobState.SUCCEEDED}

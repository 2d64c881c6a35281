"""Model cards are written from the database: after a measurement, and by ``qbatch card``."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.domain import DeviceKind, Method, format_job_id
from qbatch.core.errors import BenchmarkError
from qbatch.core.measured.details import Details
from qbatch.core.settings import Settings
from qbatch.models_db import checkpoints, jobs
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.worker.serving.cards import write_cards
from tests.rows import PROTOCOL, a_batch, a_worker, bundle, claim, fail, measured

PATH = "checkpoints/a/bnb-nf4-0"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path / "storage", cache=tmp_path / "cache")


@pytest.fixture
def folder(settings: Settings) -> Path:
    made = settings.storage / PATH
    made.mkdir(parents=True)
    (made / "qbatch.json").write_text(json.dumps({}))
    return made


def a_checkpoint_of(database: Database, job_id: int) -> None:
    key = "c" * 64
    with database.write() as session:
        checkpoints.record(session, key=key, path=PATH, root_sha256="5" * 64, disk_bytes=1, job_id=job_id)
        session.get_one(Job, job_id).checkpoint_key = key


def end_well(database: Database, token: jobs.Token, weights_bytes: int, kl_mean: float | None = None) -> None:
    judged = {"verdict": "refuses", "version": "0.11", "read_on": "2026-11-01", "reasons": ["It has no kernel."]}
    details = Details.from_json(
        {
            "task": "causal-lm",
            "fingerprint": "f",
            "quality": {"kl_mean": kl_mean},
            "audit": {"loaders": {"vllm": judged}},
        }
    )
    figures = replace(measured(), weights_bytes=weights_bytes, kl_mean=kl_mean, details=details)
    with database.write() as session:
        assert jobs.succeed(session, token, figures, protocol=PROTOCOL.for_device(DeviceKind.CPU), checkpoint_path=PATH)


def test_a_card_says_what_was_measured_and_again_once_its_baseline_is(
    database: Database, settings: Settings, folder: Path
) -> None:
    _, (base, nf4) = a_batch(database, bundle("/models/a", Method.NONE, Method.NF4))
    worker = a_worker(database)
    tokens = dict(claim(database, [base, nf4], worker))
    a_checkpoint_of(database, nf4)
    end_well(database, (nf4, tokens[nf4]), 2**20, kl_mean=0.0123)
    write_cards(database, settings, [nf4])
    card = (folder / "README.md").read_text()
    assert "| weights | 1.0 MiB |\n" in card
    assert "| mean KL (nats) | 1.2e-02 |" in card
    assert "no result under the same protocol" in card
    assert "- vllm (0.11): refuses. It has no kernel.\n" in card
    end_well(database, (base, tokens[base]), 4 * 2**20)
    write_cards(database, settings, [base])
    card = (folder / "README.md").read_text()
    assert "| weights | 1.0 MiB | 4.0 MiB | ×0.25 |" in card
    assert "AutoModelForCausalLM.from_pretrained(model_id" in card
    assert "AutoTokenizer" not in card, "there is none"
    assert "/models" not in card, "where the folder lies is nobody else's business"
    assert format_job_id(nf4) in card


def test_a_checkpoint_whose_measurement_failed_says_so(
    sqlite_database: Database, settings: Settings, folder: Path
) -> None:
    _, (_, nf4) = a_batch(sqlite_database, bundle("org/<b>|x", Method.NONE, Method.NF4))
    (token,) = claim(sqlite_database, [nf4], a_worker(sqlite_database))
    a_checkpoint_of(sqlite_database, nf4)
    fail(sqlite_database, token, BenchmarkError("no | tokens"))
    write_cards(sqlite_database, settings, [nf4])
    card = (folder / "README.md").read_text()
    assert f"None: its job {format_job_id(nf4)} is failed: benchmark_error: no \\| tokens" in card
    assert "# \\<b>\\|x, bnb-nf4" in card


def test_what_somebody_wrote_is_left_unless_it_is_asked_for(
    sqlite_database: Database,
    settings: Settings,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, (_, nf4) = a_batch(sqlite_database, bundle("/models/a", Method.NONE, Method.NF4))
    a_checkpoint_of(sqlite_database, nf4)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    with caplog.at_level(logging.INFO, "qbatch.worker"):
        write_cards(sqlite_database, settings, [nf4])
    assert "left as it is" in caplog.text
    assert (folder / "README.md").read_text().endswith("mine")
    monkeypatch.setenv("QBATCH_HOME", str(settings.home))
    done = CliRunner().invoke(main, ["card"])
    assert (done.exit_code, "left as it is" in done.stdout) == (0, True)
    done = CliRunner().invoke(main, ["card", "b1", "--overwrite"])
    assert done.stdout == f"{folder / 'README.md'} written\n"
    card = (folder / "README.md").read_text()
    assert "mine" not in card
    assert "license: mit" in card
    assert "Licence: mit, that of the base model" in card
    (folder / "qbatch.json").unlink()
    assert CliRunner().invoke(main, ["card", "j2"]).stdout == f"{folder} is not there\n"


def test_a_card_that_cannot_be_written_harms_nothing(
    sqlite_database: Database, settings: Settings, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, (_, nf4) = a_batch(sqlite_database, bundle("/models/a", Method.NONE, Method.NF4))
    a_checkpoint_of(sqlite_database, nf4)
    (folder / "README.md").mkdir()
    write_cards(sqlite_database, settings, [nf4])
    assert "`qbatch card` writes the model cards that are missing" in caplog.text

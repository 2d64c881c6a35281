"""``report`` as a command: the page and its charts as files, and what is said where they cannot be written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qbatch.cli import main
from qbatch.models_db.session import Database
from tests.reported import EPYC, MODELS, a_reported_batch
from tests.rows import a_batch


@pytest.fixture(autouse=True)
def home(sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands take for theirs, with the database of the test."""
    monkeypatch.setenv("QBATCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*args: str) -> Result:
    return CliRunner().invoke(main, ["report", *args], catch_exceptions=False)


def test_the_page_is_written_and_its_path_printed(sqlite_database: Database, tmp_path: Path) -> None:
    a_reported_batch(sqlite_database, failing=True)
    done = report("nightly", "-o", "page.html")
    assert (done.exit_code, done.stdout) == (0, "page.html\n")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{tmp_path}/storage/checkpoints/causal-lm/" in page
    assert "qbatch logs j22" in page


def test_without_a_name_it_is_called_report(sqlite_database: Database, tmp_path: Path) -> None:
    a_batch(sqlite_database)
    assert report("b1").stdout == "report.html\n"
    assert (tmp_path / "report.html").exists()


def test_a_dash_is_standard_output(sqlite_database: Database) -> None:
    a_batch(sqlite_database)
    assert report("latest", "-o", "-").stdout.startswith("<!doctype html>")


def test_of_one_model_alone(sqlite_database: Database) -> None:
    a_reported_batch(sqlite_database)
    page = report("b1", "--model", "gemma", "-o", "-").stdout
    assert "google/gemma-2-9b" in page
    assert "Mistral" not in page


def test_the_limits_are_those_of_compare(sqlite_database: Database) -> None:
    a_reported_batch(sqlite_database, models=MODELS[:1])
    assert "ship <bdi>bnb-nf4</bdi>" in report("b1", "-o", "-").stdout
    assert "ship <bdi>bnb-int8</bdi>" in report("b1", "--max-kl", "0.01", "-o", "-").stdout


def test_a_page_that_cannot_be_written_is_an_error_in_one_line(sqlite_database: Database) -> None:
    a_batch(sqlite_database)
    done = report("b1", "-o", "nowhere/page.html")
    assert done.exit_code == 2
    assert done.stderr == "qbatch: the report cannot be written to nowhere/page.html: No such file or directory\n"


def test_a_batch_that_does_not_exist(sqlite_database: Database) -> None:
    done = report("b7")
    assert (done.exit_code, done.stderr) == (2, "qbatch: no such batch: b7\n")


def test_the_charts_are_written_as_png_and_svg(sqlite_database: Database, tmp_path: Path) -> None:
    a_reported_batch(sqlite_database)
    a_reported_batch(sqlite_database, models=MODELS[:1], device_name=EPYC)
    done = report("b1", "b2", "--plots", "plots/of both")
    names = ["size-against-divergence-1", "size-against-divergence-2", "speed-against-baseline"]
    files = [f"plots/of both/{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert done.stdout.splitlines() == [*files, "report.html"]
    assert (tmp_path / files[0]).read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / files[1]).read_text(encoding="utf-8")
    assert "gemma-2-9b" in drawn
    assert "2 GiB" in drawn


def test_names_in_charts_are_no_formulas(sqlite_database: Database, tmp_path: Path) -> None:
    a_reported_batch(sqlite_database, models=[("org/$\\frac{1}{$", *MODELS[0][1:])])
    assert report("b1", "--plots", "plots").exit_code == 0
    drawn = (tmp_path / "plots" / "size-against-divergence.svg").read_text(encoding="utf-8")
    assert "frac{1}{" in drawn


def test_where_nothing_can_be_drawn_no_chart_is_written(sqlite_database: Database, tmp_path: Path) -> None:
    a_batch(sqlite_database)
    assert report("b1", "--plots", "plots").stdout == "report.html\n"
    assert list((tmp_path / "plots").iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_batch(sqlite_database)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = report("b1", "--plots", "plots")
    assert done.exit_code == 2
    assert "pip install 'qbatch[plots]'" in done.stderr
    assert not (tmp_path / "plots").exists()


def test_charts_that_cannot_be_written(sqlite_database: Database, tmp_path: Path) -> None:
    a_batch(sqlite_database)
    (tmp_path / "plots").touch()
    done = report("b1", "--plots", "plots/inside")
    assert (done.exit_code, done.stderr) == (
        2,
        "qbatch: the charts cannot be written to plots/inside: Not a directory\n",
    )

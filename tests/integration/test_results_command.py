"""``results`` and ``compare`` of a batch of eight models, as people see them on terminals of several widths."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
from click.testing import CliRunner

from qbatch.cli import main
from qbatch.core.measured.metric import Metric
from qbatch.core.measured.metrics import ALL_METRICS
from qbatch.models_db.session import Database
from qbatch.views.result_columns import column_names, find_column
from tests.measured_batch import MODELS, measured_batch

Run = Callable[..., str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Path:
    """A home with one batch."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(migrated_sqlite, folder / "qbatch.db")
    database = Database(f"sqlite:///{folder / 'qbatch.db'}")
    measured_batch(database)
    database.dispose()
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a terminal of ``width`` columns, or with None into a pipe."""
    monkeypatch.setenv("QBATCH_HOME", str(home))

    def command(*arguments: str, width: int | None = None, code: int = 0) -> str:
        monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: width is not None)
        monkeypatch.setenv("COLUMNS", str(width))
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == code, done.output
        return done.output

    return command


def rows_of(table: str) -> list[str]:
    return [line for line in table.splitlines() if re.match("[ ✓] +j[0-9]+ ", line)]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_batch_of_eight_models_fits_a_screen(run: Run, width: int) -> None:
    text = run("results", width=width)
    lines = text.splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= width
    assert lines[0].split()[:2] == ["weights", "decode"]
    assert {"KL", "top-1"} <= set(lines[0].split())
    assert len(rows_of(text)) == 24
    assert sum(line.startswith("✓") for line in rows_of(text)) == 7, (
        "of the model without a tokenizer nothing is recommended"
    )
    assert text.count("uncertain") == 1, "once in the legend; the cells are marked"
    assert "failed (j23 cuda_oom). Ship bnb-nf4 of 5 models" in " ".join(text.split())


@pytest.mark.parametrize("option", [("--bits", "4"), ("--limit", "5"), ("--scheme", "bnb-nf4"), ("--model", "*llama*")])
def test_no_filter_takes_the_ratios_away(run: Run, option: tuple[str, str]) -> None:
    text = run("results", *option, width=80)
    quantized = [line for line in rows_of(text) if "baseline" not in line]
    assert quantized
    assert all(line.count("×") == 2 for line in quantized)
    assert "no ratios" not in text


@pytest.mark.parametrize(
    ("options", "jobs"),
    [
        ("--model meta-llama/*", 3),
        ("--model META-LLAMA", 3),
        ("--model meta-llama", 3),
        ("--model ?eta-llama*", 3),
        ("--model *llama", 0),
        ("--model meta-llama --model gemma", 6),
        ("--model nosuch --model gemma", 3),
        ("--scheme bnb-nf4 --scheme none", 16),
        ("--bits 8 --bits 4", 16),
        ("--device A100 --device h200", 23),
        ("--state failed --state succeeded --bits 8", 8),
        ("--scheme bnb-nf4,none", 16),
        ("--bits 8", 8),
        ("--device h200", 23),
        ("--device A100", 0),
        ("--state failed", 1),
        ("--since 1h", 24),
        ("--since 2020-01-01", 24),
        ("--max-weights-bytes 2GiB --scheme bnb-nf4", 4),
        ("--max-kl 0.001", 2),
        ("--min-tokens-per-s 40 --bits 4", 2),
    ],
)
def test_each_filter(run: Run, options: str, jobs: int) -> None:
    assert len(json.loads(run("results", *options.split(), "--json"))) == jobs


def test_a_limit_on_kl_moves_the_mark(run: Run) -> None:
    assert sum(line.startswith("✓") for line in rows_of(run("results", "--max-kl", "0.01", width=80))) == 6
    assert all("bnb-int8" in line for line in rows_of(run("results", "--max-kl", "0.01", width=80)))


def test_sorted_rows_are_ranked_in_one_table(run: Run) -> None:
    lines = run("results", "--sort", "kl_mean", "--limit", "4", width=80).splitlines()
    assert lines[0].split() == ["KL", "weights", "decode"]
    assert [line.removeprefix("✓").split()[:2] for line in lines[1:5]] == [
        ["1", "j2"],
        ["2", "j14"],
        ["3", "j5"],
        ["4", "j17"],
    ]


def test_rows_are_sorted_by_a_title_as_by_a_key(run: Run) -> None:
    for title, key in (("KL", "kl_mean"), ("-decode", "-decode_tokens_per_s"), ("weights", "weights_bytes")):
        assert run("results", "--sort", title, "-q") == run("results", "--sort", key, "-q")


def test_filters_that_hide_everything_are_named(run: Run) -> None:
    assert "the filters let no job through" in run("results", "--model", "nosuch")
    assert "filters" not in run("results", "--model", "meta-llama")


def test_every_name_of_a_column_can_be_given(run: Run) -> None:
    names = column_names()
    assert all(re.fullmatch(r"[a-z0-9/_-]+", name) for name in names)
    run("results", "--columns", ",".join(names), "--limit", "1")


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.option_name)
def test_programs_get_the_figure_that_was_asked_for(run: Run, metric: Metric) -> None:
    """A table shows two of them in one column, as far as a model has the one or the other."""
    for name in {metric.option_name, metric.key}:
        (row, *_) = json.loads(run("results", "--columns", name, "--limit", "1", "--json"))
        assert row.keys() - {"job_id", "model", "scheme"} == {metric.key}
    assert find_column(metric.option_name).value == metric.value


def test_columns_are_chosen_by_title_or_key(run: Run) -> None:
    lines = run("results", "--columns", "peak-memory,kl_mean,Graph-Decode", "--limit", "3", width=120).splitlines()
    assert re.split(" {2,}", lines[0].strip()) == ["peak memory", "KL", "graph decode"]
    (row, *_) = json.loads(run("results", "--columns", "weights,kl", "--bits", "4", "--json"))
    assert row.keys() == {"job_id", "model", "scheme", "weights_bytes", "kl_mean"}
    said = run("results", "--columns", "nothing", code=2)
    assert rows_of(run("results", "--columns", "weights", "--columns", "kl", width=80)) == rows_of(
        run("results", "--columns", "weights,kl", width=80)
    )
    assert "'nothing' is not a column; job, model and scheme are always there, and the columns are weights" in said


def test_the_labels_may_be_named_among_the_columns(run: Run) -> None:
    for width in (80, None):
        assert run("results", "--columns", "model,scheme,KL", width=width) == run(
            "results", "--columns", "kl", width=width
        )
    table = run("results", "--columns", "model", "--bits", "4", width=80)
    assert [line.split()[-1] for line in rows_of(table)] == ["bnb-nf4"] * 8
    (row, *_) = json.loads(run("results", "--columns", "job,model", "--bits", "4", "--json"))
    assert row.keys() == {"job_id", "model", "scheme"}


def test_markdown_and_csv_have_every_row(run: Run) -> None:
    table = run("results", "--format", "md")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 26
    assert len({line.count("|") for line in lines}) == 1
    assert sum(line.startswith("| ✓ |") for line in lines) == 7
    assert table.rstrip().splitlines()[-1].startswith("24 jobs of 8 models on NVIDIA H200")
    assert len(list(csv.DictReader(io.StringIO(run("results", "--format", "csv"))))) == 24


@pytest.mark.parametrize("width", [80, 120, 200])
def test_compare_begins_with_a_line_for_each_model_and_repeats_nothing(run: Run, width: int) -> None:
    text = run("compare", width=width)
    lines = text.splitlines()
    assert len(lines) <= 36
    assert max(len(line) for line in lines if "/checkpoints" not in line) <= width, "no path is broken"
    answer = lines[1 : lines.index("")]
    models = [line.split()[0] for line in answer if not line.startswith((" ", "These checkpoints are in"))]
    assert [name[-8:] for name in models] == [model.name[-8:] for model in MODELS]
    sentences = [sentence for sentence in re.split(r"(?<=[a-z)])[.:] ", " ".join(text.split())) if len(sentence) > 20]
    assert len(sentences) == len(set(sentences))
    for said in ("bnb-nf4-aaaaaaaaaaaaaaa3", "its mean KL, 5.7e-02 nats, is over 0.05", "Chosen: the smallest weights"):
        assert said in text


@pytest.mark.parametrize("width", [80, 120])
def test_two_models_take_thirty_lines(run: Run, width: int) -> None:
    text = run("compare", "--limit", "2", width=width)
    assert len(text.splitlines()) <= 30
    assert " of 2 models" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_figures_of_two_models_take_sixty_lines(run: Run, width: int) -> None:
    lines = run("compare", "--model", "Mistral-Small", "--model", "*phi*", width=width).splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines if "/checkpoints" not in line) <= width
    assert sum(line.startswith("  peak memory") for line in lines) == 2, "a table of each, in one piece"
    assert sum("host-bound" in line for line in lines) == 4


@pytest.mark.parametrize("model", ["bloom", "*"])
def test_the_marks_are_explained_in_two_lines_or_on_request(run: Run, model: str) -> None:
    text = run("compare", "--model", model, width=80)
    *_, legend = text.split("\n\n")
    assert len(legend.strip().splitlines()) <= 2
    assert "more: --legend" in legend
    longer = run("compare", "--model", model, "--legend", width=80)
    assert "× is a figure divided by that of the baseline, the same model unquantized." in " ".join(longer.split())


def test_one_model_is_compared_in_full(run: Run) -> None:
    text = run("compare", "--model", "*bloom*", width=80)
    assert "KL of 16-bit rounding" in text
    assert "Ship bnb-int8 (j11): the smallest weights" in " ".join(text.split())
    assert "graph decode" in text
    assert max(len(line) for line in text.splitlines() if "/checkpoints/" not in line) <= 80, "no path is broken"


def test_two_models_are_compared_and_reported(run: Run) -> None:
    two = ("--model", "*bloom*", "--model", "gemma")
    names = {"bigscience/bloom-1b7", "google/gemma-2-2b-it"}
    assert {model["model"] for model in json.loads(run("compare", *two, "--json"))} == names
    page = run("report", "b1", *two, "-o", "-")
    assert {model.name for model in MODELS if model.name in page} == names
    assert "6 of the same measurement" in " ".join(run("diff", "b1", "b1", *two).split())


@pytest.mark.parametrize("job", ["j3", "j23"])
def test_a_job_is_shown_on_a_screen_and_in_full_on_request(run: Run, job: str) -> None:
    text = run("show", job, width=80)
    lines = text.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert f"`qbatch show --all {job}` shows everything" in text
    whole = run("show", "--all", job, width=80)
    assert ("\nsource\n" in text, "\nsource\n" in whole) == (False, True)
    if job == "j3":
        assert "35.6 tok/s ×0.73  (baseline 48.8 tok/s)" in text
        assert len(whole.splitlines()) > 80


def test_a_rate_may_be_asked_for(run: Run) -> None:
    def shipped(*options: str) -> list[Any]:
        models = json.loads(run("compare", "--json", *options))
        return [group["recommendation"]["ship"] for model in models for group in model["groups"]]

    assert shipped("--model", "*bloom*") == ["j11"]
    assert shipped("--model", "*bloom*", "--min-tokens-per-s", "40") == ["j10"]
    assert shipped("--model", "*bloom*", "--min-tokens-per-s", "40", "--max-kl", "0.1") == ["j12"]


def test_a_batch_beside_itself_has_one_measurement(run: Run) -> None:
    assert "23 of the same measurement; 1 not compared" in " ".join(run("diff", "b1", "latest", width=80).split())
    assert "no such batch" in run("diff", "b1", "b9", code=2)


def test_who_is_shown_each_job_of_a_batch_is_told_of_the_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBATCH_HOME", str(home))
    hint = "`qbatch results b1` shows these 24 jobs in one table"
    shown = [CliRunner().invoke(main, ["show", *words]).stderr for words in (["b1"], ["j1", "j2"], ["b1", "--json"])]
    assert [hint in text for text in shown] == [True, False, False]

"""Each job's log has the lines about that job, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbatch.core.domain import Claim
from qbatch.core.errors import SourceCorrupt
from qbatch.worker.quantizing.faults import as_job_error
from qbatch.worker.runner.job_log_writer import JobLogWriter
from qbatch.worker.runner.messages import Question, Reply, RunnerMessage
from qbatch.worker.runner.reports import Reports
from tests.rows import spec

log = logging.getLogger("qbatch.runner")


class Deaf:
    """A supervisor that takes every message and answers none."""

    def send(self, message: RunnerMessage) -> None:
        del message

    def ask(self, question: Question) -> Reply:
        raise NotImplementedError(question)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JobLogWriter]:
    """Of a bundle of j7, j8 and j9; j8 is claimed for the second time."""
    made = JobLogWriter(tmp_path, [Claim(job_id=n, attempt=1 + (n == 8), spec=spec()) for n in (7, 8, 9)])
    ours = logging.getLogger("qbatch")
    ours.addHandler(made)
    ours.setLevel(logging.INFO)
    yield made
    ours.removeHandler(made)
    ours.setLevel(logging.NOTSET)
    made.close()


def lines(folder: Path) -> dict[str, list[str]]:
    """What stands in each log, without the time."""
    return {path.name: [line.split(" ", 1)[1] for line in path.read_text().splitlines()] for path in folder.iterdir()}


def test_a_line_goes_to_the_jobs_that_it_names(writer: JobLogWriter, tmp_path: Path) -> None:
    log.info("%s: %s", "j7, j8", "quantizing")
    log.warning("j9: decode: slow")
    log.info("3 models are loaded in turns")
    logging.getLogger("transformers").warning("j9: a warning of a library")
    assert lines(tmp_path) == {
        "j7-1.log": ["INFO j7, j8: quantizing", "INFO 3 models are loaded in turns"],
        "j8-2.log": ["INFO j7, j8: quantizing", "INFO 3 models are loaded in turns"],
        "j9-1.log": ["WARNING j9: decode: slow", "INFO 3 models are loaded in turns"],
    }


def test_a_log_ends_with_its_job(writer: JobLogWriter, tmp_path: Path) -> None:
    log.info("begin")
    writer.end([7, 8])
    log.info("j7, j9: once more")
    log.info("end")
    assert lines(tmp_path)["j7-1.log"] == ["INFO begin"]
    assert lines(tmp_path)["j9-1.log"] == ["INFO begin", "INFO j7, j9: once more", "INFO end"]


def test_the_time_is_in_utc_and_control_characters_are_escaped(writer: JobLogWriter, tmp_path: Path) -> None:
    log.info("j7: \x1b[2J")
    line = (tmp_path / "j7-1.log").read_text()
    assert line.endswith("Z INFO j7: \\x1b[2J\n")
    assert line[10] == "T"


def test_a_log_that_cannot_be_written_is_mentioned_once(
    writer: JobLogWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "j7-1.log").mkdir()
    log.info("one")
    log.info("two")
    assert capsys.readouterr().err == f"runner: cannot write the log {tmp_path}/j7-1.log: Is a directory\n"
    assert (tmp_path / "j8-2.log").read_text().count("\n") == 2


def test_a_defect_has_its_traceback_in_the_logs_of_its_jobs_alone(writer: JobLogWriter, tmp_path: Path) -> None:
    reports = Reports(Deaf(), [7, 8, 9])
    with reports.failing([7, 8]):
        raise KeyError("surprise")
    for name in ("j7-1.log", "j8-2.log"):
        text = (tmp_path / name).read_text()
        assert "internal_error: KeyError: 'surprise'\nTraceback (most recent call last):\n" in text
        assert 'raise KeyError("surprise")' in text
    assert not (tmp_path / "j9-1.log").exists()


def test_a_quantization_that_fails_has_its_traceback_in_the_log(writer: JobLogWriter, tmp_path: Path) -> None:
    reports = Reports(Deaf(), [7])
    try:
        raise RuntimeError("no such kernel")
    except RuntimeError as error:
        reports.failed([7], as_job_error(error))
    text = (tmp_path / "j7-1.log").read_text()
    assert "j7: quantization_error: RuntimeError: no such kernel\nTraceback" in text


def test_a_fault_of_the_source_has_one_line(writer: JobLogWriter, tmp_path: Path) -> None:
    reports = Reports(Deaf(), [7])
    with reports.failing([7]):
        raise SourceCorrupt("its header is cut off") from OSError("https://hub/file?signature=secret")
    assert lines(tmp_path)["j7-1.log"] == ["ERROR j7: source_corrupt: its header is cut off"]

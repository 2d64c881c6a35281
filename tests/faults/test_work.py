"""A faulty job or device does not affect other jobs or devices."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from qbatch.core.domain import Stage
from qbatch.models_db.jobs import cancel
from qbatch.models_db.tables import Job
from tests.faults.conftest import MakeModel
from tests.faults.fleet import Fleet

# A GPU's driver that fails every call would fail bitsandbytes' import, which initialises CUDA, in these words.
_SICK = "raise RuntimeError('CUDA error: unspecified launch failure')\n"
_HEADER_BYTES = 100 * 2**20
# 5 s, and what a busy machine may add.
_FREE_S = 5.0 + 10.0


def test_two_batches_that_want_one_checkpoint_quantize_it_once(fleet: Fleet, make_model: MakeModel) -> None:
    model = make_model(large=True)
    (first,) = fleet.submit(model, force=True)
    (second,) = fleet.submit(model, force=True)
    fleet.succeed([first, second])
    # Which checkpoint it is, only hashing tells: what another runner writes already, a runner leaves at once.
    if fleet.outcomes(first) != ["succeeded"]:
        first, second = second, first
    assert fleet.outcomes(first) == ["succeeded"]
    assert fleet.outcomes(second) in (["succeeded"], ["handed_back", "succeeded"])
    one, other = fleet.job(first), fleet.job(second)
    assert one.checkpoint_key == other.checkpoint_key
    assert other.failures == 0
    assert one.finished_at is not None
    assert fleet.claimed_at(second) >= one.finished_at, "the second waited for the first"
    log = (fleet.logs / f"j{second}-{other.attempt}.log").read_text()
    assert "reusing the published checkpoint" in log
    assert f"j{second}: quantizing" not in log
    assert fleet.result(first).checkpoint_path == fleet.result(second).checkpoint_path


def test_a_device_of_two_errors_is_quarantined_and_its_jobs_run_elsewhere(
    fleet: Fleet, make_model: MakeModel, tmp_path: Path
) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(_SICK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    fleet.start("w3", "worker", "--cpu", PYTHONPATH=path)
    fleet.wait_for_workers(3)
    sick = next(w for w in fleet.qbatch.json("workers") if w["pid"] == fleet.celery("w3").pid)["worker"]
    jobs = fleet.submit(*[make_model() for _ in range(6)])
    fleet.succeed(jobs)
    outcomes = [fleet.outcomes(job) for job in jobs]
    assert sum(one.count("device_error") for one in outcomes) == 2
    assert {tuple(one) for one in outcomes} <= {("succeeded",), ("device_error", "succeeded")}
    assert {job.failures for job in fleet.jobs(jobs)} == {0}
    (row,) = [w for w in fleet.qbatch.json("workers") if w["worker"] == sick]
    assert row["state"] == "quarantined"
    assert row["note"] == ("two device errors in a row; the last: RuntimeError: CUDA error: unspecified launch failure")
    fleet.wait_for(lambda: "this worker is quarantined" in fleet.log("w3").read_text(), "word of it in the log")
    assert fleet.stop("w3") == 0


def test_a_job_that_kills_its_runner_every_time_fails_alone(fleet: Fleet, make_model: MakeModel) -> None:
    workers = [fleet.celery("w1"), fleet.celery("w2")]
    jobs = fleet.submit(make_model(large=True), bits=(4, 8), baseline=True)
    poison, mates = jobs[-1], jobs[:-1]
    after = 0
    for _ in range(3):
        caught = fleet.catch(poison, Stage.QUANTIZING, after=after)
        caught.runner.kill()
        after = caught.attempt
    fleet.wait_for_state([poison], "failed")
    failed = fleet.job(poison)
    assert (failed.error_kind, failed.failures) == ("host_oom", 3)
    assert fleet.outcomes(poison) == ["host_oom"] * 3
    fleet.succeed(mates)
    assert max(job.failures for job in fleet.jobs(mates)) <= 1, "a mate is charged for what it died with, once"
    assert [worker.is_running() for worker in workers] == [True, True]


def test_a_worker_told_to_stop_hands_its_jobs_back_or_finishes_them(fleet: Fleet, make_model: MakeModel) -> None:
    (job,) = fleet.submit(make_model(large=True))
    name = _name_of_worker(fleet, job)
    assert fleet.stop(name) == 0
    fleet.succeed([job])
    assert fleet.outcomes(job) == ["handed_back", "succeeded"]
    assert fleet.job(job).failures == 0
    fleet.start(name, "worker", "--cpu", "--drain")
    fleet.wait_for_workers(2)
    jobs = fleet.submit(make_model(large=True), make_model(large=True))
    fleet.wait_for_state(jobs, "running")
    assert fleet.stop(name) == 0
    fleet.succeed(jobs)
    assert [fleet.outcomes(job) for job in jobs] == [["succeeded"]] * 2
    fleet.start(name, "worker", "--cpu")
    fleet.wait_for_workers(2)


def _name_of_worker(fleet: Fleet, job: int) -> str:
    worker = fleet.wait_for_runner(job).worker
    return next(name for name in ("w1", "w2") if fleet.celery(name) == worker)


@pytest.mark.parametrize(("end", "outcomes"), [("cancelled", ["cancelled"]), ("failed", ["timeout", "timeout"])])
def test_ending_a_job_ends_its_runner_and_charges_no_other_job(
    fleet: Fleet, make_model: MakeModel, end: str, outcomes: list[str]
) -> None:
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        ended, mate = fleet.submit(make_model(large=True), baseline=True, send=False)
        if end == "failed":
            with fleet.database.write() as session:
                session.get_one(Job, ended).time_limit_s = 0.5
    if end == "cancelled":
        runner = fleet.wait_for_runner(ended).runner
        with fleet.database.write() as session:
            assert cancel(session, job_ids=[ended]) == [ended]
        _, alive = psutil.wait_procs([runner], timeout=_FREE_S)
        assert alive == [], "what it held is not free"
    fleet.wait_for_state([ended], end)
    fleet.succeed([mate])
    assert fleet.outcomes(ended) == outcomes
    assert fleet.outcomes(mate) == ["handed_back", "succeeded"]
    assert fleet.job(mate).failures == 0


def test_a_job_cancelled_while_it_waits_never_runs(fleet: Fleet, make_model: MakeModel) -> None:
    with fleet.suspended(psutil.Process(fleet.running["scheduler"].pid)):
        waiting, next_ = fleet.submit(make_model(), send=False) + fleet.submit(make_model(), send=False)
        fleet.qbatch("cancel", f"j{waiting}")
    fleet.succeed([next_])
    assert fleet.job(waiting).state == "cancelled"
    assert fleet.outcomes(waiting) == []


# ------------------------------------------------------------------------------------------------------- bad sources


def _truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size // 2)


def _shift_offsets(weights: Path) -> None:
    length, header, data = _parts(weights)
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + 2, end + 2]
    _write(weights, json.dumps(header).encode().ljust(length), data)


def _grow_header(weights: Path) -> None:
    _, header, data = _parts(weights)
    _write(weights, json.dumps(header).encode().ljust(_HEADER_BYTES), data)


def _parts(weights: Path) -> tuple[int, dict[str, dict[str, list[int]]], bytes]:
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(weights: Path, header: bytes, data: bytes) -> None:
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _transpose_a_tensor(weights: Path) -> None:
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file(tensors | {name: tensors[name].T.contiguous()}, weights, metadata={"format": "pt"})


def _spoil_a_number(weights: Path) -> None:
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def test_a_corrupt_source_fails_alone_and_in_bounded_memory(
    fleet: Fleet, make_model: MakeModel, tmp_path: Path
) -> None:
    good = make_model()
    with peak_of_runners(fleet) as peak_of_good:
        (job,) = fleet.submit(good)
        fleet.succeed([job])
    damages = (_truncate, _shift_offsets, _grow_header, _transpose_a_tensor)
    with peak_of_runners(fleet) as peak:
        corrupt = fleet.submit(*[_damaged(good, tmp_path / damage.__name__, damage) for damage in damages])
        fleet.wait_for_state(corrupt, "failed", "succeeded")
    found = {Path(job.model).name: (job.error_kind, job.error_message) for job in fleet.jobs(corrupt)}
    assert {kind for kind, _ in found.values()} == {"source_corrupt"}, found
    assert all(message and "\n" not in message for _, message in found.values())
    assert [fleet.outcomes(job) for job in corrupt] == [["source_corrupt"]] * 4
    assert peak() <= peak_of_good() + 16 * 2**20, "a header of 100 MB is not read"


def test_nan_weights_are_refused(fleet: Fleet, make_model: MakeModel, tmp_path: Path) -> None:
    jobs = fleet.submit(_damaged(make_model(), tmp_path / "nan", _spoil_a_number))
    fleet.wait_for_state(jobs, "failed", "succeeded")
    (job,) = fleet.jobs(jobs)
    assert job.error_kind == "source_corrupt"
    assert job.error_message == "1 tensor holds NaN or infinity; the first is model.layers.0.mlp.down_proj.weight"


def _damaged(model: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(model, folder)
    damage(folder / "model.safetensors")
    return folder


@contextmanager
def peak_of_runners(fleet: Fleet) -> Iterator[Callable[[], int]]:
    """The most memory that any runner held at once, in bytes, by the kernel's account; ask once the context is over."""
    peaks: dict[int, int] = {}
    ended = threading.Event()
    forkservers = [child for name in ("w1", "w2") for child in fleet.celery(name).children()]

    def watch() -> None:
        while not ended.wait(0.005):
            for forkserver in forkservers:
                for runner in forkserver.children():
                    peaks[runner.pid] = max(peaks.get(runner.pid, 0), _high_water_bytes(runner.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peaks.values())
    finally:
        ended.set()
        watcher.join()


def _high_water_bytes(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0

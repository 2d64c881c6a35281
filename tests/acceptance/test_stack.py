"""The embedded stack: restarted where it dies, stopped as a whole, its work kept."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from qbatch.core.settings import Settings
from tests.acceptance.conftest import Qbatch, await_end_of, processes_of, stop
from tests.acceptance.test_services import LONG
from tests.waiting import until


def test_sigterm_of_run_stops_everything_and_up_goes_on_with_the_batch(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    listed = model_list(models / "llama")
    qbatch.env["QBATCH_SCAN_S"] = "1"
    run = qbatch.start("run", "--models", listed, "--bits", "4,8", *LONG)
    until(lambda: "running" in qbatch.states(), "running job")
    assert stop(run, signal.SIGTERM) == 130, "as after Ctrl-C"
    await_end_of(qbatch.home)
    assert "`qbatch up` continues it" in qbatch.home.with_suffix(".log").read_text()
    assert set(_states(qbatch)) <= {"queued", "succeeded"}
    assert all(job["failures"] == 0 for job in qbatch.json("jobs")), "an interruption is nobody's fault"
    up = qbatch.start("up", "--cpu")
    try:
        qbatch.wait_for_worker()  # who loses its Redis before that does not start
        (redis_server,) = _named(qbatch, "redis-server")
        redis_server.kill()
        qbatch("wait", "b1", "--timeout", "2m")
        assert [p.pid for p in _named(qbatch, "redis-server")] != [redis_server.pid]
        assert "is already running" in qbatch("up", code=3).stderr
        # Two models: it must not have ended before the second look.
        _prune_beside_the_worker(qbatch, model_list(models / "llama", models / "bloom"))
    finally:
        assert stop(up, signal.SIGTERM) == 0
    assert set(_states(qbatch)) == {"succeeded"}


def _prune_beside_the_worker(qbatch: Qbatch, listed: str) -> None:
    logs = list((qbatch.home / "storage" / "logs").glob("*/*"))
    qbatch("submit", "--models", listed, "--bits", "4,8", "--force", *LONG)
    until(lambda: "running" in qbatch.states(), "running job")
    # Of the files' digests more grow old with each second.
    promised = qbatch.json("prune", "--older-than", "1s", "--dry-run")[:-1]
    *pruned, digests = qbatch.json("prune", "--older-than", "1s")
    assert (digests["what"], digests["number"] > 0) == ("file digests", True)
    assert pruned == promised
    kinds = ("batches", "jobs", "logs", "rejected checkpoints", "base outputs")
    assert [(row["what"], row["number"]) for row in pruned] == list(zip(kinds, (1, 3, len(logs), 0, 0), strict=True))
    qbatch("wait", "b2", "--timeout", "2m")
    assert [row["batch_id"] for row in qbatch.json("status")] == ["b2"]
    assert not any(log.exists() for log in logs)
    quantized = [row for row in qbatch.json("results") if row["scheme"] != "none"]
    assert all(row["kl_mean"] is not None for row in quantized), "its baseline's outputs were there"
    assert qbatch.json("verify") != [], "checkpoints stay, and stay on record"
    assert [row["number"] for row in qbatch.json("prune", "--older-than", "1d")] == [0] * 6


def test_up_survives_lost_socket_folders_and_leaves_nothing_when_killed(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    listed = model_list(models / "llama")
    up = qbatch.start("up", "--cpu")
    try:
        until(lambda: (qbatch.home / "qbatch.db").exists(), "database")
        qbatch.wait_for_worker()
        place = Settings.from_env(qbatch.environ).socket_dir
        cleaned = list(place.parent.glob(f"{place.name}*"))
        assert len(cleaned) == 2, "that of Redis, and that of the worker's forkserver"
        for folder in cleaned:
            shutil.rmtree(folder)
        qbatch("submit", "--models", listed, "--bits", "4")
        until(lambda: "running" in qbatch.states(), "running job")
    finally:
        up.kill()
        up.wait()
    await_end_of(qbatch.home)
    assert set(_states(qbatch)) <= {"queued", "succeeded"}, "the workers handed back what they held"


def test_a_stack_whose_database_is_deleted_stops_and_says_so(qbatch: Qbatch) -> None:
    """A worker and a scheduler that did work are started again when they die, but not for this."""
    up = qbatch.start("up", "--cpu")
    try:
        qbatch.wait_for_worker()
        (qbatch.home / "qbatch.db").unlink()
        assert up.wait(120.0) == 3
    finally:
        stop(up)
    said = qbatch.home.with_suffix(".log").read_text().splitlines()[-1]
    assert f"{qbatch.home / 'qbatch.db'} was deleted while qbatch was using it" in said
    await_end_of(qbatch.home)
    assert not (qbatch.home / "qbatch.db").exists(), "nobody made an empty one"


def test_a_stack_is_found_through_a_link_to_its_home(stack: Qbatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(stack.home)
    linked = Qbatch(tmp_path / "link", stack.env)
    found = {check["check"]: check for check in linked.json("doctor")}
    assert (found["broker"]["state"], found["scheduler"]["state"]) == ("ok", "ok")
    assert [worker["worker"] for worker in linked.json("workers")] == [w["worker"] for w in stack.json("workers")]
    assert "is already running" in linked("up", "--cpu", code=3).stderr


def _states(qbatch: Qbatch) -> list[str]:
    return [job["state"] for job in qbatch.json("jobs")]


def _named(qbatch: Qbatch, name: str) -> list[psutil.Process]:
    found = []
    for process in processes_of(qbatch.home):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if process.name() == name else []
    return found

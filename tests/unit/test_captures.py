"""Decode steps captured in a process of their own: who waits, who dies, and what is said. Without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from qbatch.worker.measuring.why import decode_kernels as graph
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.measuring.why.decode_kernels import (
    Done,
    KernelsAlone,
    KernelsRequest,
    KernelsTask,
    Shape,
    StepKernels,
)
from qbatch.worker.measuring.why.profile import StepProfile
from qbatch.worker.methods.implementations import weights_of_model
from tests import tiny
from tests.unit.benchmark_models import INT8, NF4, loaded_on_cpu, quantized

PROFILE = StepProfile(steps=8, device_busy_s=0.007, launches=1000, synchronizations=1)
SHAPE = Shape(batch_size=2, prompt_tokens=8, new_tokens=4)
REQUEST = KernelsRequest(folder="/nowhere", dtype="bfloat16", device="cuda:0", shapes=(SHAPE, SHAPE))


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


NO_GPU = "a CPU has neither CUDA graphs nor kernels to profile"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_captures_share_their_imports_and_every_shape_has_its_answer(tmp_path: Path) -> None:
    """What goes wrong with one model is a reason, and the next is asked all the same."""
    with Captures() as captures:
        (on_cpu,) = captures.kernels([replace(REQUEST, device="cpu")])
        assert reasons(on_cpu) == [(NO_GPU,) * 2] * 2
        server = captures.server.process
        assert server.num_threads() == 1, "it forks"
        broken = replace(REQUEST, folder=str(tmp_path))
        for found in captures.kernels([broken, replace(broken, not_captured="known")]):
            assert [(one.alone.step_s, one.profile) for one in found if one.alone is not None] == [(None, None)] * 2
            assert all("config.json" in profile for _, profile in reasons(found))
        assert reasons(found)[0][0] == "known"
        assert captures.server.process == server
    assert not psutil.pid_exists(server.pid)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_process_that_loaded_the_models_ahead_is_the_one_that_answers(tmp_path: Path) -> None:
    """It ends when it is not needed, and one that died is replaced."""
    request = replace(REQUEST, device="cpu", folder=str(tiny.make_causal(tmp_path / "llama")))
    log = tmp_path / "log"

    def prepared() -> psutil.Process:
        log.unlink(missing_ok=True)
        captures.prepare([request])
        until(lambda: log.exists() and f"loading {request.folder}" in log.read_text())
        (process,) = children(captures.server.process.pid)
        return process

    with Captures(log_path=log) as captures:
        first = prepared()
        assert reasons(captures.kernels([request])[0]) == [(NO_GPU,) * 2] * 2
        assert not psutil.pid_exists(first.pid)
        captures.release()
        second = prepared()
        captures.release()
        assert not psutil.pid_exists(second.pid)
        third = prepared()
        third.kill()
        assert reasons(captures.kernels([request])[0]) == [(NO_GPU,) * 2] * 2
        nowhere = replace(request, folder=str(tmp_path / "nowhere"))
        captures.prepare([nowhere])
        until(lambda: log.exists() and "a later process tries that again" in log.read_text())
        assert reasons(captures.kernels([request])[0]) == [(NO_GPU,) * 2] * 2
        last = prepared()
    assert psutil.wait_procs([last], timeout=10)[1] == []


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


FORKING_RUNNER = """
import os, select, time
from dataclasses import replace
from pathlib import Path
from qbatch.worker.measuring.why import kernels_process
from qbatch.worker.measuring.why.capture import Captures
from qbatch.worker.measuring.why.kernels_server import fork_server
from tests.unit.test_captures import REQUEST, reasons
ours, of_worker = os.pipe()
server = fork_server()
captures = Captures(server)
begin_s = time.perf_counter()
answer = reasons(captures.kernels([replace(REQUEST, device="cpu")])[0])
took_s = time.perf_counter() - begin_s
os.close(of_worker)
has_ended = select.select([ours], [], [], 10)[0] == [ours]
print(server.process.pid, has_ended, server.process.num_threads(), took_s, answer[0][1])
kernels_process.measure_all = lambda tasks, models: 1 / 0
with Captures(fork_server(), log_path=Path("log")) as failing:
    print(reasons(failing.kernels([replace(REQUEST, device="cpu")])[0])[0][1], flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_forked_server_answers_at_once_and_ends_with_its_runner(tmp_path: Path) -> None:
    """It has the runner's imports, and nothing else of it: by the end of its pipe a worker knows that a runner ended.
    What libraries print goes into the bundle's log."""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", FORKING_RUNNER]
    runner = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environ)
    assert runner.stdout is not None
    try:
        with runner.stdout:
            pid, has_ended, threads, took_s, answer = runner.stdout.readline().rstrip().split(" ", 4)
            assert "the capturing process died" in runner.stdout.readline()
            server = psutil.Process(int(pid))
    finally:
        runner.kill()
        runner.wait()
    assert answer == NO_GPU
    assert (has_ended, threads) == ("True", "1")
    assert float(took_s) < 2, "one that is started anew imports for as long and longer"
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert psutil.wait_procs([server], timeout=60)[1] == []


def reasons(found: list[StepKernels]) -> list[tuple[str, ...]]:
    """Why there are no kernels alone, and why no profile."""
    return [(str(one.alone and one.alone.reason), str(one.reason)) for one in found]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_capturing_process_that_dies_or_is_late_leaves_a_reason(tmp_path: Path) -> None:
    slow = replace(REQUEST, folder=str(_slow_model(tmp_path)))
    log = tmp_path / "log"
    with Captures(log_path=log) as captures:
        captures.kernels([replace(REQUEST, device="cpu")])
        killer = threading.Thread(target=_kill_at_work, args=(captures.server.process.pid, log, slow.folder))
        killer.start()
        assert all("the capturing process died" in reason for reason in reasons(captures.kernels([slow])[0])[0])
        killer.join()
        captures._time_limit_s = 0.2
        server = captures.server.process.pid
        assert all("took longer than 0.2 s" in reason for reason in reasons(captures.kernels([slow])[0])[1])
        assert not psutil.pid_exists(server)


def _slow_model(folder: Path) -> Path:
    """Of so many tensors that it takes seconds to read their header."""
    header = {f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(300_000)}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(header)))
    (folder / "config.json").write_text("{}")
    return folder


def _kill_at_work(pid: int, log: Path, folder: str) -> None:
    """Kill the process that captures, then the one that profiles: the capture may be what the first died of. One that
    dies before it begins has another in its place, and no reason."""
    for count in (1, 2):
        until(lambda wanted=count: log.read_text().count(f"loading {folder}") == wanted)
        (process,) = children(pid)
        process.kill()


ALONE = KernelsAlone(step_s=0.005)
FAILED = KernelsAlone(reason="not capturable: it waits")
PROFILED = StepKernels(profile=PROFILE)


class CannedCaptures(Captures):
    """What each process answers is canned here: without a GPU there is nothing that could be captured."""

    def __init__(self, *answers: list[Done]) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked: list[list[tuple[str, bool, bool]]] = []

    def _ask(self, tasks: Sequence[KernelsTask]) -> list[Done]:
        self.asked.append([(task.request.folder, task.capture, task.profile) for task in tasks])
        return self.answers.pop(0)


def of_models(*folders: str) -> list[KernelsRequest]:
    return [replace(REQUEST, folder=folder, shapes=(SHAPE,)) for folder in folders]


def test_one_process_captures_and_profiles_all_models() -> None:
    captures = CannedCaptures(
        [
            *(Done(number=number, alones=[ALONE]) for number in range(2)),
            *(Done(number=number, profiles=[PROFILED]) for number in range(2)),
        ]
    )
    assert captures.kernels(of_models("a", "b")) == [[replace(PROFILED, alone=ALONE)]] * 2
    assert captures.asked == [[("a", True, True), ("b", True, True)]]


def test_after_a_failed_capture_another_process_does_what_is_left() -> None:
    captures = CannedCaptures(
        [Done(number=0, alones=[ALONE]), Done(number=1, alones=[FAILED])],
        [
            Done(number=2, alones=[ALONE]),
            *(Done(number=number, profiles=[PROFILED]) for number in range(3)),
        ],
    )
    found = [one for (one,) in captures.kernels(of_models("a", "b", "c"))]
    assert found == [replace(PROFILED, alone=alone) for alone in (ALONE, FAILED, ALONE)]
    assert captures.asked[1] == [("a", False, True), ("b", False, True), ("c", True, True)]


def test_a_process_that_dies_costs_what_it_was_doing_and_no_more() -> None:
    captures = CannedCaptures(
        [Done(number=0, alones=[ALONE])],
        [Done(number=0, profiles=[PROFILED])],
        [],
    )
    first, second = (one for (one,) in captures.kernels(of_models("a", "b")))
    assert first == replace(PROFILED, alone=ALONE)
    assert second.alone is not None
    assert "the capturing process died" in str(second.alone.reason)
    assert "the capturing process died" in str(second.reason)
    assert captures.asked == [
        [("a", True, True), ("b", True, True)],
        [("a", False, True), ("b", False, True)],
    ]


def test_what_is_known_not_to_be_capturable_is_only_profiled() -> None:
    captures = CannedCaptures([Done(number=0, profiles=[PROFILED])])
    (request,) = of_models("a")
    ((found,),) = captures.kernels([replace(request, not_captured="it waits")])
    assert found == replace(PROFILED, alone=KernelsAlone(reason="it waits"))
    assert captures.asked == [[("a", False, True)]]


def task(folder: str, *, capture: bool = True) -> KernelsTask:
    return KernelsTask(request=replace(REQUEST, folder=folder, shapes=(SHAPE,)), capture=capture, profile=True)


def test_a_capture_that_fails_is_the_last_thing_that_its_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is spoilt. Without a GPU every capture fails."""
    model = loaded_on_cpu(tiny.make_causal(tmp_path)).model
    monkeypatch.setattr(graph, "_load", lambda _request: model)
    (captured,) = graph.measure_all([task("a"), task("b")], graph.Models())
    assert captured.number == 0
    assert captured.profiles is None
    assert [str(alone.reason)[:16] for alone in captured.alones or ()] == ["not capturable: "]


def test_profiles_come_after_the_last_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model is loaded once, and again only if the device did not hold all of them."""
    loads: list[str] = []
    monkeypatch.setattr(graph, "_load", lambda request: loads.append(request.folder) or request.folder)
    monkeypatch.setattr(graph, "_capture_each", lambda _model, request: [ALONE] * len(request.shapes))
    monkeypatch.setattr(graph, "_profile_each", lambda _model, request: [PROFILED] * len(request.shapes))
    done = list(graph.measure_all([task("a"), task("b", capture=False), task("c")], graph.Models()))
    assert [(one.number, one.alones is not None) for one in done] == [
        *((0, True), (2, True)),
        *((0, False), (1, False), (2, False)),
    ]
    assert loads == ["a", "c", "b"]


def test_a_model_that_was_loaded_ahead_is_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shapes are that are asked for in the end."""
    loads: list[str] = []
    monkeypatch.setattr(graph, "_load", lambda request: loads.append(request.folder) or request.folder)
    monkeypatch.setattr(graph, "_capture_each", lambda _model, request: [ALONE] * len(request.shapes))
    monkeypatch.setattr(graph, "_profile_each", lambda _model, request: [PROFILED] * len(request.shapes))
    models = graph.Models()
    assert models.prepare([task(folder).request for folder in "ab"])
    assert loads == ["a", "b"]
    again = replace(REQUEST, folder="a", not_captured="known")
    list(graph.measure_all([KernelsTask(request=again, capture=False, profile=True), task("c")], models))
    assert loads == ["a", "b", "c"]


def test_where_one_model_cannot_be_loaded_ahead_none_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner may be short of it, and the fault may be one of the device: another process takes the tasks."""
    asked: list[str] = []

    def load(request: KernelsRequest) -> str:
        asked.append(request.folder)
        if request.folder == "b":
            raise torch.OutOfMemoryError("out of memory")
        return request.folder

    monkeypatch.setattr(graph, "_load", load)
    models = graph.Models()
    assert not models.prepare([task(folder).request for folder in "abc"])
    assert asked == ["a", "b"]


def test_a_model_for_which_no_memory_is_left_is_loaded_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load(request: KernelsRequest) -> str:
        loads.append(request.folder)
        if loads == ["a", "b"]:
            raise torch.OutOfMemoryError("out of memory")
        return request.folder

    monkeypatch.setattr(graph, "_load", load)
    monkeypatch.setattr(graph, "_capture_each", lambda _model, request: [ALONE] * len(request.shapes))
    monkeypatch.setattr(graph, "_profile_each", lambda _model, request: [PROFILED] * len(request.shapes))
    done = list(graph.measure_all([task("a"), task("b")], graph.Models()))
    assert [(one.number, one.alones) for one in done[:2]] == [(0, [ALONE]), (1, [ALONE])]
    assert [one.profiles for one in done[2:]] == [[PROFILED]] * 2
    assert loads == ["a", "b", "b", "a"]


def test_int8_is_known_not_to_be_capturable_with_its_outlier_path_alone(tmp_path: Path) -> None:
    source = tiny.make_causal(tmp_path / "llama")

    def why_not(folder: Path) -> str | None:
        model = loaded_on_cpu(folder).model
        return weights_of_model(model).why_not_captured(model)

    int8 = quantized(source, tmp_path / "int8", INT8)
    assert "outlier path" in str(why_not(int8))
    config = json.loads((int8 / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (int8 / "config.json").write_text(json.dumps(config))
    assert why_not(int8) is None
    assert why_not(quantized(source, tmp_path / "nf4", NF4)) is None
    assert why_not(source) is None


def test_a_profiler_that_sees_no_kernels_gives_no_profile(tmp_path: Path) -> None:
    """A device that is busy for none of a step would be called host-bound."""
    model = loaded_on_cpu(tiny.make_causal(tmp_path)).model
    assert graph._profile(model, SHAPE, "cpu") == StepKernels(reason="the profiler recorded no work on the GPU")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_capture_does_not_outlive_its_runner(tmp_path: Path) -> None:
    """The GPU belongs to the next one."""
    code = (
        "from dataclasses import replace; from tests.unit.test_captures import *;"
        f"Captures().kernels([replace(REQUEST, folder={str(_slow_model(tmp_path))!r})])"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 200
        while len(found := children(runner.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        while found[-1].num_threads() < 2:  # before that it does not know yet with whom it ends
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found[-1].suspend()  # so that it does not end by itself
    finally:
        runner.kill()
        runner.wait()
    assert psutil.wait_procs(found, timeout=60)[1] == []

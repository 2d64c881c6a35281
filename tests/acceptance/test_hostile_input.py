"""Hostile input to a running stack: models that would run code, and messages that are more than job ids."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from celery import Celery
from safetensors.torch import load_file

from qbatch.core.domain import DeviceKind
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import RUN_BUNDLE, queue_of
from tests.acceptance.conftest import Qbatch, command_lines, stop
from tests.integration.test_security import Canary
from tests.waiting import until

_CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "one-of-its-own"
"""
_MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
_TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
_AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def canaries(tmp_path: Path) -> Path:
    """The folder in which executed code leaves its name."""
    folder = tmp_path / "canaries"
    folder.mkdir()
    return folder


def make_own(folder: Path, llama: Path, canaries: Path, **config: Any) -> Path:
    """A Llama with its own configuration, model and tokenizer code, each of which leaves a mark when imported."""
    shutil.copytree(llama, folder)
    files = {"configuration_own": _CONFIGURATION, "modeling_own": _MODELING, "tokenization_own": _TOKENIZATION}
    for name, code in files.items():
        canary = canaries / f"{folder.name}-{name}"
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n{code}")
    edit(folder / "config.json", auto_map=_AUTO_MAP, **config)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def make_pickled(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def kinds_of(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    """How each model's jobs ended."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(Path(row["model"]).name, set()).add(row["error_kind"] or row["state"])
    return kinds


def test_no_code_of_a_model_runs_in_a_default_installation(
    stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path, canaries: Path
) -> None:
    llama = models / "llama"
    own = {"model_type": "one-of-its-own", "architectures": ["OwnForCausalLM"]}
    make_own(tmp_path / "all-its-own", llama, canaries, **own)
    make_own(tmp_path / "own-class", llama, canaries, architectures=["OwnForCausalLM"])
    # Another config than the next one's: the same would be answered by its result.
    make_own(tmp_path / "own-tokenizer", llama, canaries, note="another")
    # transformers has everything that this one needs: its own code is left alone.
    known = make_own(tmp_path / "known", llama, canaries)
    edit(known / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (known / "custom_generate").mkdir()
    shutil.copy(known / "modeling_own.py", known / "custom_generate" / "generate.py")
    pickled = make_pickled(tmp_path / "pickled", llama)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canaries / "pickle")))
    # Weights that transformers would take before the safetensors.
    pointed = shutil.copytree(llama, tmp_path / "pointed")
    (pointed / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canaries / "pointed")))
    edit(pointed / "config.json", transformers_weights="adapter_model.bin")
    names = ("all-its-own", "own-class", "own-tokenizer", "known", "pickled", "pointed")
    listed = model_list(*(tmp_path / name for name in names))
    for option, refused in (([], {"pickled", "pointed"}), (["--allow-pickle"], {"pointed"})):
        submit = ("submit", "--models", listed, "--bits", "4", "--wait", "--format", "json", "--keep-going")
        done = stack(*submit, *option, code=1, timeout_s=280)
        ended = {
            "all-its-own": {"unsafe_source"},
            "own-class": {"unsafe_source"},
            "own-tokenizer": {"unsafe_source"},
            "known": {"succeeded"},
            "pickled": {"unsafe_source"},
        }
        assert kinds_of(json.loads(done.stdout)) == {name: ended[name] for name in ended.keys() - refused}
        left_out = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
        assert {name for name in names if any(f"{tmp_path / name}: " in line for line in left_out)} == refused
    assert list(canaries.iterdir()) == []


def test_a_model_listed_in_the_workers_settings_runs_its_code(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path, canaries: Path
) -> None:
    own = {"model_type": "one-of-its-own", "architectures": ["OwnForCausalLM"]}
    trusted = make_own(tmp_path / "trusted", models / "llama", canaries, **own)
    make_own(tmp_path / "not-named", models / "llama", canaries, **own)
    foreign = make_own(tmp_path / "foreign", models / "llama", canaries, **own)
    edit(foreign / "config.json", auto_map={"AutoConfig": "someone/else--configuration_own.OwnConfig"})
    qbatch.env |= {
        "QBATCH_TRUST_REMOTE_CODE": f"org/model, {trusted}/, {foreign}",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    listed = model_list(trusted, tmp_path / "not-named", foreign)
    done = qbatch("run", "--models", listed, "--bits", "4,8", "--format", "json", code=1, timeout_s=280)
    rows = json.loads(done.stdout)
    assert kinds_of(rows) == {"trusted": {"succeeded"}, "not-named": {"unsafe_source"}, "foreign": {"unsafe_source"}}
    assert {path.name for path in canaries.iterdir()} == {
        "trusted-configuration_own",
        "trusted-modeling_own",
        "trusted-tokenization_own",
    }
    quantized = [row for row in rows if row["checkpoint_path"]]
    assert {row["scheme"] for row in quantized} == {"bnb-nf4", "bnb-int8"}
    for row in quantized:
        assert row["kl_mean"] is not None, "the tokenizer came along"
        checkpoint = Path(row["checkpoint_path"])
        assert {path.name for path in checkpoint.glob("*.py")} >= {"configuration_own.py", "modeling_own.py"}
    for path in canaries.iterdir():
        path.unlink()
    qbatch("verify", "b1")
    assert list(canaries.iterdir()) == [], "to look at a checkpoint runs nothing"


def test_an_allowed_pickle_is_quantized_and_measured(
    stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    listed = model_list(make_pickled(tmp_path / "bloom-pickled", models / "bloom"))
    done = stack("submit", "--models", listed, "--bits", "4", "--allow-pickle", "--wait", "--format", "json")
    assert {row["state"] for row in json.loads(done.stdout)} == {"succeeded"}
    again = stack("submit", "--models", listed, "--bits", "4", "--wait", code=2)
    assert "has only pickles" in again.stderr, "asked for each time"


# folders


def test_a_folder_outside_the_roots_is_refused_by_line_and_by_worker(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    shutil.copytree(models / "llama", inside / "llama")
    (inside / "way-out").symlink_to(models / "bloom")
    qbatch.env["QBATCH_MODEL_ROOTS"] = f"{tmp_path / 'none'}:{inside}"
    listed = model_list(inside / "llama", inside / "way-out", inside / ".." / "x", models / "bloom")
    refused = qbatch("submit", "--models", listed, "--bits", "4", code=2).stderr
    assert all(f"line {number}: " in refused for number in (2, 3, 4))
    assert "line 1" not in refused
    assert qbatch.json("status") == []
    del qbatch.env["QBATCH_MODEL_ROOTS"]
    qbatch("submit", "--models", model_list(inside / "llama", inside / "way-out"), "--bits", "16")
    qbatch.env["QBATCH_MODEL_ROOTS"] = str(inside)
    stack = qbatch.start("up", "--cpu")
    try:
        qbatch("wait", "b1", code=1)
        kinds = {Path(row["model"]).name: row["error_kind"] for row in qbatch.json("results")}
    finally:
        stop(stack, signal.SIGINT)
    assert kinds == {"llama": None, "way-out": "unsafe_source"}


def test_a_remote_broker_takes_no_folder_without_roots(
    qbatch: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    qbatch.env["QBATCH_BROKER_URL"] = "redis://broker.invalid:6379/0"
    listed = model_list("org/model", models / "llama")
    refused = qbatch("submit", "--models", listed, "--bits", "4", code=2).stderr
    assert "line 2: " in refused
    assert "QBATCH_MODEL_ROOTS" in refused
    qbatch.env["QBATCH_MODEL_ROOTS"] = str(models)
    qbatch("submit", "--models", listed, "--bits", "4")


# messages


@pytest.fixture
def app(stack: Qbatch) -> Iterator[Celery]:
    app = make_app(Settings.from_env(stack.environ))
    yield app
    app.close()


def _hostile(app: Celery) -> list[dict[str, Any]]:
    """Messages to the right task that are not a list of ids, or contain more than that."""
    return [
        {"args": [["1"]]},
        {"args": [[[1]]]},
        {"args": [[{"id": 1}]]},
        {"args": [[]]},
        {"args": [[0]]},
        {"args": [[-1]]},
        {"args": [[True]]},
        {"args": [[1.0]]},
        {"args": [[None]]},
        {"args": [[1, 1]]},
        {"args": [[2**63]]},
        {"args": [[10**400]]},
        {"args": [list(range(1, 1000))]},
        {"args": [1]},
        {"args": ["1"]},
        {"args": [{"1": 2}]},
        {"args": []},
        {"args": [[1], [2]]},
        {"args": [[1]], "kwargs": {"trust_remote_code": True}},
        {"kwargs": {"job_ids": [1]}},
        {"args": [[1]], "task_id": "not an id"},
        {"args": [[1]], "task_id": "two\nlines" * 1000},
        {"args": [[1]], "countdown": 3600},
        {"args": [[1]], "expires": 3600},
        {"args": [[1]], "time_limit": 1},
        {"args": [[1]], "link": app.signature(RUN_BUNDLE, args=[[1]])},
        {"args": [[1]], "link_error": app.signature("celery.backend_cleanup")},
        {"args": [[1]], "shadow": "another\nline"},
        {"args": [[1]], "argsrepr": "long" * 1000},
        {"args": [[1]], "headers": {"trust_remote_code": True}},
        # Celery would die of these, and put them back for the next worker.
        {"args": [[1]], "headers": {"timelimit": 5}},
        {"args": [[1]], "headers": {"task": {"not": "hashable"}}},
        {"args": [[1]], "headers": {"retries": "abc"}},
        {"args": [[1]], "headers": {"ignore_result": []}},
    ]


def test_a_message_of_more_than_ids_is_refused_and_the_worker_lives_on(
    stack: Qbatch, app: Celery, models: Path, model_list: Callable[..., str], canaries: Path
) -> None:
    queue = queue_of(DeviceKind.CPU)
    (before,) = stack.json("workers")
    log = stack.home / "logs" / "workers.log"
    logged = len(log.read_text())
    jobs = {job["job_id"]: job["attempt"] for job in stack.json("jobs")}
    hostile = _hostile(app)
    for message in hostile:
        app.send_task(RUN_BUNDLE, queue=queue, **({"task_id": str(uuid.uuid4())} | message))
    # Tasks that are not ours, Celery's own among them, and a body that only pickle reads.
    for name in ("celery.map", "celery.chain", "os.system", "qbatch.run_bundle\n"):
        app.send_task(name, args=[[1]], queue=queue)
    app.send_task(RUN_BUNDLE, args=[Canary(canaries / "message")], queue=queue, serializer="pickle")
    listed = model_list(models / "bert-mlm")
    stack("submit", "--models", listed, "--bits", "8", "--no-baseline", "--force", "--wait")
    assert [worker["worker"] for worker in stack.json("workers")] == [before["worker"]]
    said = log.read_text()[logged:]
    assert said.count(" refused: ") == len(hostile) + 1 + 4
    assert said.count("it is for another task") == 1 + 4
    assert "two\nlines" not in said
    assert "another\nline" not in said
    assert list(canaries.iterdir()) == []
    assert jobs.items() <= {job["job_id"]: job["attempt"] for job in stack.json("jobs")}.items(), "nothing ran again"


_COMMANDS: dict[str, dict[str, Any]] = {
    "shutdown": {},
    "pool_shrink": {"n": 1},
    "pool_grow": {"n": 3},
    "pool_restart": {},
    "autoscale": {"max": 0, "min": 0},
    "cancel_consumer": {"queue": queue_of(DeviceKind.CPU)},
    "add_consumer": {"queue": "another"},
    "rate_limit": {"task_name": RUN_BUNDLE, "rate_limit": "1/h"},
    "time_limit": {"task_name": RUN_BUNDLE, "hard": 0.001},
    "revoke": {"task_id": str(uuid.uuid4())},
    "terminate": {"task_id": str(uuid.uuid4()), "signal": "KILL"},
    "revoke_by_stamped_headers": {"headers": {}},
    "hello": {"from_node": "another", "revoked": {str(uuid.uuid4()): 0.0}},
    "election": {"id": "1", "topic": "task"},
    "disable_events": {},
    "no such command\n": {},
}


def test_a_worker_answers_questions_and_takes_no_orders(
    stack: Qbatch, app: Celery, models: Path, model_list: Callable[..., str]
) -> None:
    (before,) = stack.json("workers")
    log = stack.home / "logs" / "workers.log"
    logged = len(log.read_text())
    for command, arguments in _COMMANDS.items():
        (reply,) = app.control.broadcast(command, arguments=arguments, reply=True, limit=1, timeout=30.0)
        assert reply[before["worker"]]["error"].startswith("refused"), command
    assert log.read_text()[logged:].count(" refused") == len(_COMMANDS)
    assert "no such command\n" not in log.read_text()
    listed = model_list(models / "bert-mlm")
    for _ in range(2):  # a rate limit lets the first one through
        stack("submit", "--models", listed, "--bits", "8", "--no-baseline", "--force", "--wait")
    assert [worker["worker"] for worker in stack.json("workers")] == [before["worker"]]
    asked = app.control.inspect([before["worker"]], timeout=30.0, limit=1)
    queues = asked.active_queues()[before["worker"]]
    assert [queue["name"] for queue in queues] == [queue_of(DeviceKind.CPU)]
    assert asked.ping() == {before["worker"]: {"ok": "pong"}}
    assert asked.stats()[before["worker"]]["pool"]["max-concurrency"] == 1


def test_a_bundle_with_jobs_of_two_models_is_refused(
    stack: Qbatch, app: Celery, models: Path, model_list: Callable[..., str]
) -> None:
    """A runner opens only one source: a job of another model in its bundle would get the results of the wrong model."""
    listed = model_list(models / "llama", models / "bloom")
    stack("submit", "--models", listed, "--bits", "16", "--wait")
    ids = [int(job["job_id"][1:]) for job in stack.json("jobs")]
    log = stack.home / "logs" / "workers.log"
    app.send_task(RUN_BUNDLE, args=[ids], queue=queue_of(DeviceKind.CPU), task_id=str(uuid.uuid4()))
    until(lambda: "refused: its jobs belong to different models" in log.read_text(), "refusal")


def test_a_malformed_message_does_not_stop_the_queue(
    stack: Qbatch, models: Path, model_list: Callable[..., str]
) -> None:
    """Such a command ends the Celery process, which is then restarted."""
    with redis.Redis.from_url(Settings.from_env(stack.environ).redis_url) as client:
        for raw in ("garbage", "{}", "[]", '{"body": "x", "headers": {"task": "qbatch.run_bundle"}, "properties": {}}'):
            client.lpush(queue_of(DeviceKind.CPU), raw)
    listed = model_list(models / "bert-mlm")
    stack("submit", "--models", listed, "--bits", "8", "--no-baseline", "--force", "--wait", timeout_s=250)


def test_the_embedded_redis_listens_on_a_private_socket_alone(stack: Qbatch) -> None:
    place = Settings.from_env(stack.environ).socket.resolve().parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "redis.sock").stat().st_mode) == 0o700
    found = [process for process, words in command_lines(stack.home).items() if str(place) in " ".join(words)]
    # Without those that a server forks to save its data.
    servers = [process for process in found if process.parent() not in found]
    assert len(servers) == 1
    assert servers[0].net_connections(kind="inet") == []

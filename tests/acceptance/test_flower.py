"""Flower refuses to be open, and shows what was sent to whoever has the password."""

from __future__ import annotations

import base64
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qbatch.core.errors import StackNotRunning
from qbatch.core.settings import Settings
from qbatch.scheduler import service_health
from tests import tiny
from tests.acceptance.conftest import Qbatch, stop
from tests.waiting import until

# The comma once made a user "admin" of what follows it, whose password was empty.
CREDENTIALS = "someone:a-canary,admin:"
PAGES = (
    *("", "workers", "worker/x", "task/x", "tasks", "tasks/datatable", "broker", "metrics", "healthcheck", "logout"),
    *("api/workers", "api/tasks", "api/task/types", "api/queues/length", "api/task/info/x", "no/such/page"),
)


@contextmanager
def flower(qbatch: Qbatch, log: Path, **env: str) -> Iterator[int]:
    """Flower on the port that is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = Qbatch(qbatch.home, qbatch.env | env).start("flower", "--port", str(port), log=log)
    try:
        until(lambda: _status(port, "workers", None) is not None, "Flower")
        yield port
    finally:
        stop(process)


def test_flower_requires_its_credentials(stack: Qbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "QBATCH_FLOWER_AUTH" in stack("flower", code=2).stderr
    log = tmp_path / "flower.log"
    with flower(stack, log, QBATCH_FLOWER_AUTH=CREDENTIALS, FLOWER_BASIC_AUTH="guest:guest") as port:
        for page in PAGES:
            assert _status(port, page, None) == 401, page
        for strangers in ("someone:else", "admin:", "someone:a-canary", "guest:guest", "", ":", "sömeone:else"):
            assert _status(port, "workers", strangers) == 401, strangers
        for page in ("workers", "metrics", "healthcheck", "api/workers"):
            assert _status(port, page, CREDENTIALS) == 200, page
        assert _status(port, "api/worker/shutdown/x", CREDENTIALS, data=b"") == 403, "it only shows"
        credentials = {"QBATCH_FLOWER_AUTH": CREDENTIALS}
        refused = Qbatch(stack.home, stack.env | credentials)("flower", "--port", str(port), code=2).stderr
        assert f"Flower cannot listen on port {port} of 127.0.0.1: Address already in use; use" in refused
        monkeypatch.setattr(service_health, "FLOWER_PORT", port)
        assert "answers" in service_health.check_flower(Settings.from_env({"QBATCH_FLOWER_AUTH": CREDENTIALS}))
        with pytest.raises(StackNotRunning, match="answers with 401"):
            service_health.check_flower(Settings.from_env({"QBATCH_FLOWER_AUTH": "someone:else"}))
    with pytest.raises(StackNotRunning, match="does not answer"):
        service_health.check_flower(Settings.from_env({"QBATCH_FLOWER_AUTH": CREDENTIALS}))
    assert "a-canary" not in log.read_text()


def test_a_config_file_where_flower_starts_does_not_open_it(
    stack: Qbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "flowerconfig.py").write_text(f"open({str(canary)!r}, 'w')\nbasic_auth = []\n")
    monkeypatch.chdir(tmp_path)
    with flower(stack, tmp_path / "flower.log", QBATCH_FLOWER_AUTH="someone:a-canary") as port:
        assert _status(port, "workers", None) == 401
    assert not canary.exists()


def test_flower_names_a_task_after_its_work_and_shows_our_queues(
    stack: Qbatch, models: Path, model_list: Callable[..., str], tmp_path: Path
) -> None:
    with flower(stack, tmp_path / "flower.log", QBATCH_FLOWER_AUTH="someone:a-canary") as port:
        model = models / "bert-mlm"
        # Later in the alphabet, and sent first.
        other = tiny.make_causal(tmp_path / "zz" / "llama", seed=3)
        options = ("--models", model_list(other, model), "--bits", "8", "--force", "--wait", "-q")
        batch = stack("submit", *options).stdout.strip()
        named = {
            name: ", ".join(job["job_id"] for job in stack.json("jobs", "--batch", batch) if job["model"] == name)
            for name in (str(model), str(other))
        }
        shown = [(name, f"{batch}: baseline, bnb-int8 · {jobs}") for name, jobs in named.items()]
        assert [task for task in _tasks(port) if task in shown] == sorted(shown), "they are sorted by what is shown"
        # What the link of a name asks for.
        assert {name for name, _ in _tasks(port, f"name:{model}")} == {str(model)}
        assert shown[1] in _tasks(port, f"{batch}:")
        broker = _page(port, "broker", "someone:a-canary")
        assert "/zz/llama" not in _page(port, "metrics", "someone:a-canary")
        assert 'task="qbatch.run_bundle"' in _page(port, "metrics", "someone:a-canary")
    assert "<td>qbatch.cpu</td>" in broker
    assert "<td>qbatch.cuda.80</td>" in broker
    assert "<td>celery</td>" not in broker


def _tasks(port: int, search: str = "") -> list[tuple[str, str]]:
    """The name and arguments of each task that the page of tasks lists, sorted by name."""
    query = {"draw": 1, "start": 0, "length": 100, "search[value]": search}
    sort = {"order[0][column]": 0, "order[0][dir]": "asc", "columns[0][data]": "name"}
    page = _page(port, f"tasks/datatable?{urllib.parse.urlencode(query | sort)}", "someone:a-canary")
    answer = json.loads(page)
    assert "searchError" not in answer
    return [(row["name"], row["args"]) for row in answer["data"]]


def test_flower_without_a_stack_says_so(qbatch: Qbatch) -> None:
    qbatch.env["QBATCH_FLOWER_AUTH"] = "someone:a-canary"
    assert "no stack is running with its home in" in qbatch("flower", code=3).stderr


@pytest.mark.parametrize("credentials", ["", "someone", "someone:", ":password", "someone:pässword", "some\none:word"])
def test_invalid_flower_credentials_are_refused(qbatch: Qbatch, credentials: str) -> None:
    qbatch.env["QBATCH_FLOWER_AUTH"] = credentials
    refused = qbatch("flower", code=2).stderr
    assert "QBATCH_FLOWER_AUTH" in refused
    assert "password" not in refused.replace("user:password", "").replace("needs a password", "")


def _page(port: int, page: str, credentials: str) -> str:
    with urllib.request.urlopen(_request(port, page, credentials), timeout=60) as answer:  # noqa: S310
        text: str = answer.read().decode()
    return text


def _request(port: int, page: str, credentials: str | None, data: bytes | None = None) -> urllib.request.Request:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{page}", data)
    if credentials is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(credentials.encode()).decode())
    return request


def _status(port: int, page: str, credentials: str | None, data: bytes | None = None) -> int | None:
    """The HTTP status of a page; None while nothing listens."""
    try:
        with urllib.request.urlopen(_request(port, page, credentials, data), timeout=60) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return None

"""What a worker reads of a message before Celery does."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st
from kombu import Message

from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import RUN_BUNDLE
from qbatch.worker.serving.message_check import problem_of

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Celery]:
    home: Path = tmp_path_factory.mktemp("home")
    app = make_app(Settings.from_env({"QBATCH_HOME": str(home)}))
    app.conf.broker_url = "memory://"
    yield app
    app.close()


def sent(app: Celery, **options: Any) -> Message:
    """As a worker gets it."""
    options = {"task_id": str(uuid.uuid4()), "args": [[1, 2]]} | options
    app.send_task(RUN_BUNDLE, queue="checked", **options)
    with app.connection_for_read() as connection, connection.SimpleQueue("checked") as queue:
        message = queue.get(timeout=10)
        message.ack()
        return message


@pytest.fixture(scope="module")
def plain(app: Celery) -> Message:
    return sent(app)


def test_a_message_as_the_broker_sends_it_is_accepted(app: Celery) -> None:
    assert problem_of(sent(app)) is None
    assert problem_of(sent(app, argsrepr="org/model at 4 bits", priority=3)) is None


@given(
    name=st.sampled_from(["id", "task", "timelimit", "retries", "eta", "argsrepr", "ignore_result", "new"]), value=JSON
)
def test_any_header_is_accepted_or_refused(plain: Message, name: str, value: Any) -> None:
    message = copy(plain)
    message.headers = plain.headers | {name: value}
    problem = problem_of(message)
    assert problem is None or "\n" not in problem
    if isinstance(value, (list, dict)) and value and name != "timelimit":
        assert problem is not None


def test_a_body_that_cannot_be_read_is_refused(app: Celery) -> None:
    message = sent(app)
    message.body = "[" * 100_000
    message._decoded_cache = None
    assert problem_of(message) == "it cannot be read (DecodeError)"
    message.content_encoding = "of-its-own"
    assert "it cannot be read" in str(problem_of(message))


@pytest.mark.parametrize("headers", [None, [], {}])
def test_headers_that_are_none_of_celery_s_are_refused(app: Celery, headers: Any) -> None:
    message = sent(app)
    message.headers = headers
    assert problem_of(message) is not None

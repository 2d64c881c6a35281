"""Flower refuses to be open, and shows what was sent."""

from __future__ import annotations

import base64
import socket
import urllib.error
import urllib.request

from tests.acceptance.conftest import Qbatch, stop
from tests.waiting import until


def test_flower_wants_credentials_and_takes_no_others(stack: Qbatch) -> None:
    assert "QBATCH_FLOWER_AUTH" in stack("flower", code=2).stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stack.env["QBATCH_FLOWER_AUTH"] = "someone:a-canary-password"
    log = stack.home.with_name("flower.log")
    try:
        flower = stack.start("flower", "--port", str(port), log=log)
        try:
            until(lambda: _status(port, None) is not None, "Flower")
            assert _status(port, None) == 401
            assert _status(port, "someone:else") == 401
            assert _status(port, "someone:a-canary-password") == 200
        finally:
            stop(flower)
    finally:
        del stack.env["QBATCH_FLOWER_AUTH"]
    assert "a-canary-password" not in log.read_text()


def _status(port: int, credentials: str | None) -> int | None:
    """The HTTP status of the list of workers; None while nothing listens."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/workers")
    if credentials is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(credentials.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError:
        return None

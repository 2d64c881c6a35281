"""What a worker's processes log."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading

_FETCH = """
import logging, sys
from qbatch.worker.machine.logs import log_to_stderr
log_to_stderr()
from huggingface_hub.utils import get_session
assert get_session().get(sys.argv[1]).status_code == 200
logging.getLogger("qbatch.worker").info("fetched")
"""


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


def test_a_signed_link_is_not_logged() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/model.safetensors?X-Amz-Signature=canary"
        argv = [sys.executable, "-c", _FETCH, url]
        online = os.environ | {"HF_HUB_OFFLINE": "0"}
        done = subprocess.run(argv, env=online, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "qbatch.worker INFO fetched" in done.stderr
    assert "canary" not in done.stderr


def test_a_log_contains_no_control_characters() -> None:
    script = (
        "import logging, sys, warnings; held = logging.StreamHandler();"
        "from qbatch.worker.machine.logs import log_to_stderr;"
        "log_to_stderr(); logging.getLogger('transformers').addHandler(held);"
        "hostile = chr(27) + '[2J' + chr(7) + chr(0x9b);"
        "logging.getLogger('transformers').warning('%s', hostile); print(hostile, file=sys.stderr);"
        "warnings.warn(hostile); raise ValueError('two\\nlines' + hostile)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert not set(done.stderr) & {"\x1b", "\x07", "\x9b"}
    assert done.stderr.count("\\x1b[2J\\x07\\x9b") >= 4
    assert "two\nlines" in done.stderr


def test_celery_does_not_warn_of_root_since_messages_carry_no_code() -> None:
    script = (
        "import os; os.geteuid = os.getuid = lambda: 0;"
        "from qbatch.worker.machine.logs import log_to_stderr; from celery.platforms import check_privileges;"
        "log_to_stderr(); check_privileges(['json'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

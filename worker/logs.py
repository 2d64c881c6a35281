"""What a worker's processes log, and where to: stderr, which their parent points at a file."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
# They log the URL of each request, and a hub's download links are signed: who has one has the file.
_LOUD = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3")


def log_to_stderr() -> None:
    """From INFO up, but for what could give a secret away. Also used where stderr was replaced by then."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)

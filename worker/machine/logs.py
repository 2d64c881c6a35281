"""What a worker's processes log, and where to: stderr, which their parent points at a file."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from qbatch.core.control_characters import escape_controls

_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
# They log the URL of each request, and a hub's download links are signed: who has one has the file.
_LOUD = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3")


def log_to_stderr() -> None:
    """From INFO up, but for what could give a secret away. Also used where stderr was replaced by then."""
    keep_from_steering(sys.stderr)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)


def keep_from_steering(stream: TextIO) -> None:
    """Have control characters, which a model's names may hold, written as escapes: who reads a log has a terminal.

    The stream stays the same object, since libraries that are imported by now hold it.
    """
    write = stream.write
    stream.write = lambda text: write(escape_controls(text, in_lines=True))  # type: ignore[method-assign]

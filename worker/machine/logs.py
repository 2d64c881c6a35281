"""Logging of a worker's processes to stderr, which their parent redirects to a file."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from qbatch.core.control_characters import escape_controls

_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
# These log the URL of each request. The download links of a hub are signed, so anyone who reads one gets the file.
_LOUD = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3")
# Celery's, of ten lines. Its reason is that messages may carry code, and those of qbatch are JSON with ids.
_OF_ROOT = "You're running the worker with superuser privileges"


def log_to_stderr() -> None:
    """Log from INFO up, without what could reveal a secret. Uses the current ``sys.stderr``."""
    escape_control_characters(sys.stderr)
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=_OF_ROOT)


def escape_control_characters(stream: TextIO) -> None:
    """Make ``stream`` escape control characters, which names in a model may contain and a terminal would obey.

    The stream stays the same object, because libraries may already refer to it.
    """
    write = stream.write
    stream.write = lambda text: write(escape_controls(text, in_lines=True))  # type: ignore[method-assign]

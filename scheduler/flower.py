"""Flower with a password on every page."""

from __future__ import annotations

import os
import re
from typing import Any

from qbatch.core.errors import UsageError
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import RUN_BUNDLE, all_queues

# Flower would execute a flowerconfig.py in the current directory, which could turn the password off.
_NO_CONFIG = f"--conf={os.devnull}"
# Flower would keep 100,000, of 7 KiB each.
_TASKS_KEPT = 10_000
# Made by models_db.window.label_of.
_LABEL = re.compile(r"(?P<batch>b[0-9]+) (?P<work>.+) · (?P<jobs>[^·]+)")


def serve(settings: Settings, *, address: str, port: int) -> None:
    """Run Flower until it is stopped. Raises UsageError if no user and password are set."""
    set_options(_credentials(settings))
    from flower import urls

    _show_every_queue()
    urls.handlers[:] = [_require_password(handler) for handler in urls.handlers]
    make_app(settings).start(["flower", _NO_CONFIG, f"--address={address}", f"--port={port}"])


def set_options(credentials: str) -> None:
    """Those of Flower in this process. Its own variables come later: FLOWER_MAX_TASKS may ask for more tasks."""
    from flower.options import options

    # Set in Python, because FLOWER_BASIC_AUTH is a comma-separated list, in which the part of a password after a comma
    # would become a user without a password; and command-line arguments are visible to everyone in the process list.
    os.environ.pop("FLOWER_BASIC_AUTH", None)
    options.basic_auth = [credentials]
    options.max_tasks = _TASKS_KEPT
    options.format_task = name_after_its_work


def name_after_its_work(task: Any) -> Any:
    """A task as Flower shows it, called after what it does: all of them have the same name in Celery.

    ``b3 org/model: scheme · j7, j8`` becomes the name ``org/model: scheme (b3)`` with the arguments ``j7, j8``.
    """
    label = _LABEL.fullmatch(task.args or "") if task.name == RUN_BUNDLE else None
    if label is not None:
        task.name = f"{label['work']} ({label['batch']})"
        task.args = label["jobs"]
    return task


def _show_every_queue() -> None:
    """Flower shows the queues of the workers that have answered it, and before that one that qbatch does not have."""
    from flower.views import BaseHandler

    BaseHandler.get_active_queue_names = lambda _: all_queues()


def _credentials(settings: Settings) -> str:
    credentials = settings.flower_auth or ""
    if not all(credentials.partition(":")):
        raise UsageError("Flower needs a password: set QBATCH_FLOWER_AUTH=user:password")
    if not (credentials.isascii() and credentials.isprintable()):
        # Flower cannot compare other characters, and would refuse the right password.
        raise UsageError("QBATCH_FLOWER_AUTH must contain only printable ASCII characters: Flower supports no others")
    return credentials


def _require_password(entry: Any) -> Any:
    """Make a page of Flower ask for the password first.

    In Flower, each page checks it by itself, and ``/metrics`` and ``/healthcheck`` do not. Images and style sheets
    stay public: they are the same in every installation.
    """
    from flower.views import BaseHandler
    from tornado.web import HTTPError, URLSpec

    spec = entry if isinstance(entry, URLSpec) else URLSpec(*entry)
    page = spec.handler_class
    if not issubclass(page, BaseHandler):
        return spec

    def prepare(self: Any) -> Any:
        try:
            self.get_current_user()  # raises 401
        except TypeError as error:  # a password that is not ASCII; Flower would answer with a traceback
            raise HTTPError(401) from error
        return page.prepare(self)

    return URLSpec(spec.regex.pattern, type(page.__name__, (page,), {"prepare": prepare}), spec.kwargs, spec.name)

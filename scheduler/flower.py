"""Flower with a password on every page, and with tasks that are called after what they do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from qbatch.core.errors import StackNotRunning, UsageError
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import RUN_BUNDLE, all_queues
from qbatch.scheduler.stack_lock import stack_is_running

# Flower would execute a flowerconfig.py in the current directory, which could turn the password off.
_NO_CONFIG = f"--conf={os.devnull}"
# Flower would keep 100,000, of 7 KiB each.
_TASKS_KEPT = 10_000
# Made by models_db.window.label_of.
_LABEL = re.compile(r"(?P<batch>b[0-9]+) (?P<model>.+): (?P<schemes>[^:·]+ · [^·]+)")
# The names of all others are the same, or say nothing. The last one is the link to a task's page.
_COLUMNS = "name,args,state,received,runtime,worker,uuid"


def serve(settings: Settings, *, address: str, port: int) -> None:
    """Run Flower until it is stopped. Raises UsageError if no user and password are set, or if it cannot listen there,
    and StackNotRunning if it would look at an embedded stack that does not run."""
    credentials = _credentials(settings)
    if settings.is_embedded and not stack_is_running(settings):
        raise StackNotRunning(
            f"no stack is running with its home in {settings.home}, so Flower has nothing to show: start one with"
            " `qbatch up`, or set QBATCH_BROKER_URL"
        )
    set_options(credentials)
    from flower import urls

    _name_tasks_after_their_work()
    _show_every_queue()
    urls.handlers[:] = [_require_password(handler) for handler in urls.handlers]
    try:
        make_app(settings).start(["flower", _NO_CONFIG, f"--address={address}", f"--port={port}"])
    except OSError as error:
        raise UsageError(
            f"Flower cannot listen on port {port} of {address}: {error.strerror}; use others (--port, --address)"
        ) from error


def set_options(credentials: str) -> None:
    """Set Flower's options in this process. Its variables are read later, so FLOWER_MAX_TASKS still has an effect."""
    from flower.options import options

    # Set in Python, because FLOWER_BASIC_AUTH is a comma-separated list, in which the part of a password after a comma
    # would become a user without a password; and command-line arguments are visible to everyone in the process list.
    os.environ.pop("FLOWER_BASIC_AUTH", None)
    options.basic_auth = [credentials]
    options.max_tasks = _TASKS_KEPT
    options.tasks_columns = _COLUMNS
    # Workers refuse what the buttons ask for, so there are none.
    options.read_only = True


def named_after_its_work(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event of a task, whose name in Celery is the same as that of all others.

    A task with the arguments ``b3 org/model: scheme · j7, j8`` gets the name ``org/model`` and the arguments
    ``b3: scheme · j7, j8``. So a name lists what was done to a model, and Flower's search finds it.
    """
    label = _LABEL.fullmatch(event.get("args") or "") if event.get("name") == RUN_BUNDLE else None
    if label is None:
        return dict(event)
    return {**event, "name": label["model"], "args": f"{label['batch']}: {label['schemes']}"}


def _name_tasks_after_their_work() -> None:
    """Rename tasks in the state that pages, sorting and search share. Metrics keep the one name, because a label of a
    metric must not have a value for each model."""
    from flower import events

    class NamedTasks(events.EventsState):  # type: ignore[misc]
        def event(self, event: Mapping[str, Any]) -> None:
            super().event(named_after_its_work(event))

    class OneNameForAll(events.PrometheusMetrics):  # type: ignore[misc]
        def observe_task(self, worker: str, event: Mapping[str, Any], task: Any) -> None:
            super().observe_task(worker, {**event, "name": RUN_BUNDLE}, task)

    events.EventsState = NamedTasks
    events.PrometheusMetrics = OneNameForAll


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

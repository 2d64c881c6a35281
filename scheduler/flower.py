"""Flower, shut: none of its pages answers without the one user's password."""

from __future__ import annotations

import os
from typing import Any

from qbatch.core.errors import UsageError
from qbatch.core.settings import Settings
from qbatch.scheduler.celery_app import make_app

# Flower runs the Python of a flowerconfig.py where it is started, which could open it again.
_NO_CONFIG = f"--conf={os.devnull}"


def serve(settings: Settings, *, address: str, port: int) -> None:
    """Run Flower until it is told to stop. Raises UsageError without credentials."""
    credentials = _credentials(settings)
    from flower import urls
    from flower.options import options

    # Not by FLOWER_BASIC_AUTH, a comma list: what follows a comma in a password would be a user of its own, without
    # one. Nor by the arguments: those are everyone's to read in the process list.
    os.environ.pop("FLOWER_BASIC_AUTH", None)
    options.basic_auth = [credentials]
    urls.handlers[:] = [_shut(handler) for handler in urls.handlers]
    make_app(settings).start(["flower", _NO_CONFIG, f"--address={address}", f"--port={port}"])


def _credentials(settings: Settings) -> str:
    credentials = settings.flower_auth or ""
    if not all(credentials.partition(":")):
        raise UsageError("Flower is open to anyone without a password: set QBATCH_FLOWER_AUTH=user:password")
    if not (credentials.isascii() and credentials.isprintable()):
        # Flower compares no others, and would turn its own user away.
        raise UsageError("QBATCH_FLOWER_AUTH has other than printable ASCII characters, which Flower cannot compare")
    return credentials


def _shut(entry: Any) -> Any:
    """A page of Flower's that asks for the password before anything else: its own do each for itself, and ``/metrics``
    and ``/healthcheck`` do not. Its pictures and styles are the same everywhere, and left as they are."""
    from flower.views import BaseHandler
    from tornado.web import HTTPError, URLSpec

    spec = entry if isinstance(entry, URLSpec) else URLSpec(*entry)
    page = spec.handler_class
    if not issubclass(page, BaseHandler):
        return spec

    def prepare(self: Any) -> Any:
        try:
            self.get_current_user()  # raises 401
        except TypeError as error:  # what is not ASCII, which Flower would answer with a page of its insides
            raise HTTPError(401) from error
        return page.prepare(self)

    return URLSpec(spec.regex.pattern, type(page.__name__, (page,), {"prepare": prepare}), spec.kwargs, spec.name)

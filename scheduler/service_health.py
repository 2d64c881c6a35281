"""Whether a service of this host works, as a container's health check asks."""

from __future__ import annotations

import base64
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from qbatch.core.domain import LOST, WorkerState
from qbatch.core.errors import StackNotRunning
from qbatch.core.settings import Settings
from qbatch.models_db.health import health
from qbatch.models_db.listing import list_workers
from qbatch.models_db.session import Database

FLOWER_PORT = 5555
_TIMEOUT_S = 10.0
_UNFIT = (LOST, WorkerState.QUARANTINED)
# A proxy for the hub is not for this host.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def check_scheduler(settings: Settings) -> str:
    """Which scheduler leads. Raises StackNotRunning if none does, DatabaseUnreachable."""
    database = _database(settings)
    with database.read() as session:
        leader = health(session, settings.lease_s, lead_s=settings.lead_s).leader
    if leader is None:
        raise StackNotRunning("no scheduler leads: jobs are neither sent nor taken back from lost workers")
    return f"{leader} leads"


def check_worker(settings: Settings) -> str:
    """The live workers of this host. Raises StackNotRunning if there are none, DatabaseUnreachable."""
    database = _database(settings)
    with database.read() as session:
        workers = list_workers(session, settings.lease_s)
    host = socket.gethostname()
    live = [one["worker"] for one in workers if one["host"] == host and one["state"] not in _UNFIT]
    if not live:
        raise StackNotRunning(f"no worker of {host} is live")
    return f"{', '.join(live)} live"


def _database(settings: Settings) -> Database:
    database = Database(settings.sqlalchemy_url)
    database.require_schema()
    return database


def check_flower(settings: Settings) -> str:
    """Raises StackNotRunning unless Flower answers on this host."""
    request = urllib.request.Request(f"http://127.0.0.1:{FLOWER_PORT}/healthcheck")
    credentials = base64.b64encode((settings.flower_auth or "").encode()).decode()
    request.add_header("Authorization", f"Basic {credentials}")
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_S):
            return f"Flower answers on port {FLOWER_PORT}"
    except urllib.error.HTTPError as error:
        raise StackNotRunning(f"Flower answers with {error.code} on port {FLOWER_PORT}") from error
    except OSError as error:
        raise StackNotRunning(f"Flower does not answer on port {FLOWER_PORT}: {error}") from error


SERVICES: Mapping[str, Callable[[Settings], str]] = {
    "scheduler": check_scheduler,
    "worker": check_worker,
    "flower": check_flower,
}

"""``qbatch doctor``: is this installation well, and if not, what is wrong with it, in words. Changes nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from models_db.doctor import Health, PauseNote, health
from models_db.errors import DatabaseUnreachable, UsageError
from models_db.private_folder import fault_of
from models_db.session import SCHEMA_HEAD, Database
from models_db.settings import Settings
from views.checks import Check, State, check
from views.libraries import Gpu, cuda, versions
from views.units import show_bytes, show_time

# A checkpoint of a small model; under this, nothing useful can be written.
_LEAST_FREE_BYTES = 1 << 30


def examine(settings: Settings, *, gpus: Sequence[Gpu], stack_runs: bool) -> Iterable[Check]:
    """All checks that need no heavy import. ``gpus``: what NVML shows; ``stack_runs``: whether the embedded stack of
    this home is up."""
    yield from versions()
    yield cuda(gpus)
    yield _folder("home", settings.home)
    yield _folder("storage", settings.storage)
    yield _broker(settings, stack_runs)
    database_check, found = _database(settings)
    yield database_check
    if found is not None:
        yield from _service(found, waits=not settings.is_embedded or stack_runs)


# Where things are kept


def _folder(name: str, folder: Path) -> Check:
    """Whether files can be written there, and how much room there is. Leaves nothing behind."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return check(name, State.WRONG, f"{folder} cannot be written: {error.strerror}")
    room = f"{folder}, {show_bytes(free)} free" + ("" if place == folder else "; made when it is first needed")
    if free < _LEAST_FREE_BYTES:
        return check(name, State.WRONG, f"{room}: less than {show_bytes(_LEAST_FREE_BYTES)}")
    return check(name, State.OK, room)


# What must answer


def _broker(settings: Settings, stack_runs: bool) -> Check:
    place = broker_place(settings)
    # Of a stack that runs the link knows; it may have started with another environment.
    folder = settings.socket.parent.resolve() if stack_runs else settings.socket_dir
    fault = fault_of(folder) if settings.is_embedded else None
    if fault is not None:
        advice = "have it removed, or set XDG_RUNTIME_DIR to a folder of your own"
        return check("broker", State.WRONG, f"{folder} {fault}, and Redis needs it for its socket: {advice}")
    if settings.is_embedded and not stack_runs:
        return check("broker", State.NOTE, f"{place}: no stack is running here; `qbatch up` starts one")
    import redis

    client = redis.Redis.from_url(settings.redis_url, socket_connect_timeout=5, socket_timeout=5)
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        # Its own words may hold the URL, and with it the password.
        return check("broker", State.WRONG, f"{place} does not answer ({type(error).__name__})")
    finally:
        client.close()
    return check("broker", State.OK, place)


def broker_place(settings: Settings) -> str:
    """The broker's address without user, password and options."""
    if settings.is_embedded:
        return str(settings.socket)
    parts = urlsplit(settings.celery_broker_url)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "") + parts.path


def _database(settings: Settings) -> tuple[Check, Health | None]:
    """Its check, and what it knows where it can be asked."""
    try:
        database = Database(settings.sqlalchemy_url)
    except UsageError as error:
        return check("database", State.WRONG, str(error)), None
    try:
        version = database.schema_version()
        if version != SCHEMA_HEAD:
            return _schema(database, version), None
        with database.read() as session:
            found = health(session, settings.lease_s)
    except DatabaseUnreachable as error:
        return check("database", State.WRONG, str(error)), None
    finally:
        database.dispose()
    return check("database", State.OK, f"{database.place}, schema {version}"), found


def _schema(database: Database, version: str | None) -> Check:
    if database.is_sqlite and version is None:
        return check("database", State.NOTE, f"{database.place}: none yet; made when it is first needed")
    stands = f"{database.place} is at schema {version or 'none'}, this qbatch needs {SCHEMA_HEAD}"
    if database.is_sqlite:
        return check("database", State.NOTE, f"{stands}; the next command brings it up to date")
    return check("database", State.WRONG, f"{stands}: run `qbatch db upgrade`")


# What works


def _service(found: Health, *, waits: bool) -> Iterable[Check]:
    """``waits``: services are meant to run, also while there is nothing to do."""
    has_work = bool(found.open_jobs)
    yield _scheduler(found, waits or has_work)
    yield from _workers(found, has_work)
    jobs = ", ".join(f"{count} {state}" for state, count in found.open_jobs.items())
    yield check("jobs", State.OK, jobs or "none is waiting or running")
    failed = ", ".join(f"{count} {kind}" for kind, count in found.failed.items())
    yield check("failures", State.NOTE if failed else State.OK, f"within a day: {failed or 'none'}")
    for pause in found.pauses:
        yield check("pause", State.WRONG, _pause(pause))


def _scheduler(found: Health, is_needed: bool) -> Check:
    if found.leader is not None:
        return check("scheduler", State.OK, f"{found.leader} leads")
    return check("scheduler", State.WRONG if is_needed else State.NOTE, "none leads: nothing is dispatched or retried")


def _workers(found: Health, has_work: bool) -> Iterable[Check]:
    ready = [worker for worker in found.workers if worker["state"] == "ready"]
    if ready:
        yield check("workers", State.OK, f"{len(ready)} ready: {', '.join(worker['worker'] for worker in ready)}")
    else:
        state = State.WRONG if has_work else State.NOTE
        yield check("workers", state, "none is ready" + (", and jobs are waiting" if has_work else ""))
    for worker in found.workers:
        if worker["state"] == "quarantined":
            yield check(worker["worker"], State.WRONG, f"quarantined: {worker['note'] or 'no reason is on record'}")
        elif worker["state"] == "lost" and (worker["jobs"] or _is_of_today(worker["heartbeat_at"])):
            held = f", holding {', '.join(worker['jobs'])}" if worker["jobs"] else ""
            said = f"; {worker['note']}" if worker["note"] else ""
            yield check(worker["worker"], State.NOTE, f"silent since {show_time(worker['heartbeat_at'])}{held}{said}")


def _is_of_today(iso: str) -> bool:
    # Those that were killed once stay on record for ever.
    return datetime.now(UTC) - datetime.fromisoformat(iso) < timedelta(days=1)


def _pause(pause: PauseNote) -> str:
    return f"dispatch is paused since {show_time(pause.since.isoformat())}: {pause.message}"

"""``qbatch doctor``: is this installation well, and if not, what is wrong with it, in words. Changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from qbatch.core.byte_units import GIB
from qbatch.core.domain import LOST, WorkerState
from qbatch.core.errors import DatabaseUnreachable, StorageUnavailable, UsageError
from qbatch.core.filesystem import Refusal, disk_space, probe, require_locks
from qbatch.core.private_folder import fault_of
from qbatch.core.settings import Settings
from qbatch.models_db.health import Health, PauseNote, health
from qbatch.models_db.network_share import share_of
from qbatch.models_db.session import SCHEMA_HEAD, Database
from qbatch.views.checks import Check, State, check
from qbatch.views.libraries import VisibleGpu, cuda, versions
from qbatch.views.units import show_bytes, show_time

_WITHOUT = {
    Refusal.SYNC_FILE: "fsync of a file: what was written just before a power cut may be made again",
    Refusal.SYNC_FOLDER: "fsync of a folder: what was published just before a power cut may be made again",
    Refusal.MODE: "chmod: who may read a checkpoint is the mount's to say",
}
# A checkpoint of a small model; under this, nothing useful can be written.
_LEAST_FREE_BYTES = GIB


def examine(settings: Settings, *, gpus: Sequence[VisibleGpu], stack_runs: bool) -> Iterable[Check]:
    """All checks that need no heavy import. ``gpus``: what NVML shows; ``stack_runs``: whether the embedded stack of
    this home is up."""
    yield from versions()
    yield cuda(gpus)
    yield _folder("home", settings.home)
    yield _folder("storage", settings.storage)
    yield _file_system(settings.storage)
    yield from _locks(settings)
    yield _broker(settings, stack_runs)
    database_checks, found = _database(settings)
    yield from database_checks
    yield from _spool(settings)
    if found is not None:
        yield from _service(found, waits=not settings.is_embedded or stack_runs)


# Where things are kept


def _folder(name: str, folder: Path) -> Check:
    """Whether files can be written there, and how much room there is. Leaves nothing behind."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            room = disk_space(place)
    except OSError as error:
        return check(name, State.WRONG, f"{folder} cannot be written: {error.strerror}")
    free = "its file system does not say how much is free" if room is None else f"{show_bytes(room.free)} free"
    said = f"{folder}, {free}" + ("" if place == folder else "; made when it is first needed")
    if room is not None and room.free < _LEAST_FREE_BYTES:
        return check(name, State.WRONG, f"{said}: less than {show_bytes(_LEAST_FREE_BYTES)}")
    return check(name, State.OK, said)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next((place for place in (folder, *folder.parents) if place.exists()), folder)


def _file_system(storage: Path) -> Check:
    """What the storage's refuses. Leaves nothing behind."""
    try:
        refused = probe(_existing(storage))
    except StorageUnavailable as error:
        return check("file system", State.WRONG, str(error))
    if refused:
        said = "; ".join(_WITHOUT[refusal] for refusal in sorted(refused))
        return check("file system", State.NOTE, f"the storage's refuses {said}")
    return check("file system", State.OK, "the storage's does all that checkpoints need")


def _locks(settings: Settings) -> Iterable[Check]:
    """What is wrong with those of the folders that are this machine's own, as far as these are there."""
    for folder, what, variable in (
        (settings.home, "the stack", "QBATCH_HOME"),
        (settings.cache, "the cache of sources", "QBATCH_CACHE"),
    ):
        try:
            require_locks(_existing(folder), what, variable)
        except StorageUnavailable as error:
            yield check("locks", State.WRONG, str(error))


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


def _database(settings: Settings) -> tuple[list[Check], Health | None]:
    """Its checks, and what it knows where it can be asked."""
    try:
        database = Database(settings.sqlalchemy_url)
    except UsageError as error:
        return [check("database", State.WRONG, str(error))], None
    share = share_of(database.file)
    warned = [check("database's disk", State.NOTE, share.warning)] if share is not None else []
    try:
        if share is not None:
            share.check(settings.lease_s)
        found_check, found = _ask(database, settings)
    except DatabaseUnreachable as error:
        return [*warned, check("database", State.WRONG, str(error))], None
    finally:
        database.dispose()
    return [*warned, found_check], found


def _ask(database: Database, settings: Settings) -> tuple[Check, Health | None]:
    """Raises DatabaseUnreachable."""
    if database.is_behind():
        return _behind(database, database.schema_version()), None
    version = database.schema_version()
    with database.read() as session:
        found = health(session, settings.lease_s, lead_s=settings.lead_s)
    newer = f", newer than this qbatch's {SCHEMA_HEAD}, which works with it" if version != SCHEMA_HEAD else ""
    return check("database", State.OK, f"{database.place}, schema {version}{newer}"), found


def _behind(database: Database, version: str | None) -> Check:
    if database.is_sqlite and version is None:
        return check("database", State.NOTE, f"{database.place}: none yet; made when it is first needed")
    stands = f"{database.place} is at schema {version or 'none'}, this qbatch needs {SCHEMA_HEAD}"
    if database.is_sqlite:
        return check("database", State.NOTE, f"{stands}; the next command brings it up to date")
    return check("database", State.WRONG, f"{stands}: run `qbatch db upgrade`")


def _spool(settings: Settings) -> Iterable[Check]:
    """Outcomes that this machine's workers hold for the database; a line only where there are any."""
    waiting = sorted(settings.spool.glob("*.json"))
    if waiting:
        said = f"{len(waiting)} waiting in {settings.spool} for a worker of this home to record them"
        yield check("spool", State.NOTE, said)
    for aside in sorted(settings.spool.glob("*.rejected")):
        said = f"{aside} could not be recorded and was set aside: rename it to .json to try it again, or delete it"
        yield check("spool", State.WRONG, said)


# What works


def _service(found: Health, *, waits: bool) -> Iterable[Check]:
    """``waits``: services are meant to run, also while there is nothing to do."""
    if found.ahead_s is not None:
        yield check("clock", State.WRONG, _clock(found.ahead_s))
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
    ready = [worker for worker in found.workers if worker["state"] == WorkerState.READY]
    if ready:
        yield check("workers", State.OK, f"{len(ready)} ready: {', '.join(worker['worker'] for worker in ready)}")
    else:
        state = State.WRONG if has_work else State.NOTE
        yield check("workers", state, "none is ready" + (", and jobs are waiting" if has_work else ""))
    for worker in found.workers:
        if worker["state"] == WorkerState.QUARANTINED:
            yield check(worker["worker"], State.WRONG, f"quarantined: {worker['note'] or 'no reason is on record'}")
        elif worker["state"] == LOST and (worker["jobs"] or _is_of_today(worker["heartbeat_at"])):
            held = f", holding {', '.join(worker['jobs'])}" if worker["jobs"] else ""
            said = f"; {worker['note']}" if worker["note"] else ""
            yield check(worker["worker"], State.NOTE, f"silent since {show_time(worker['heartbeat_at'])}{held}{said}")


def _clock(ahead_s: float) -> str:
    return (
        f"leases or heartbeats lie {ahead_s:.0f} s further ahead than any given now: the database's clock was set back,"
        " which a running scheduler puts right within a lease; or QBATCH_LEASE_S or QBATCH_SCAN_S is smaller here"
    )


def _is_of_today(iso: str) -> bool:
    # Those that were killed once stay on record for ever.
    return datetime.now(UTC) - datetime.fromisoformat(iso) < timedelta(days=1)


def _pause(pause: PauseNote) -> str:
    return f"dispatch is paused since {show_time(pause.since.isoformat())}: {pause.message}"

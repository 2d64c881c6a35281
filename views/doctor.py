"""``qbatch doctor``: check whether this installation works, and say what is wrong if it does not. Changes nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from qbatch.core.byte_units import GIB
from qbatch.core.domain import LOST, WorkerState, format_batch_id
from qbatch.core.errors import DatabaseUnreachable, StorageUnavailable, UsageError
from qbatch.core.filesystem import Refusal, disk_space, probe, require_locks
from qbatch.core.private_folder import why_not_private
from qbatch.core.settings import Settings
from qbatch.models_db.connections import ADVICE, count_connections
from qbatch.models_db.health import Health, PauseNote, health
from qbatch.models_db.network_share import share_of
from qbatch.models_db.session import SCHEMA_HEAD, Database
from qbatch.views.checks import Check, State, check
from qbatch.views.libraries import VisibleGpu, cuda, versions
from qbatch.views.units import show_bytes, show_time
from qbatch.views.why_waiting import why_lacking

_WITHOUT = {
    Refusal.SYNC_FILE: "fsync of a file: a power cut may lose recent writes, which are then made again",
    Refusal.SYNC_FOLDER: "fsync of a folder: a power cut may lose recent renames, which are then done again",
    Refusal.MODE: "chmod: the mount decides who may read a checkpoint",
}
# The size of a small model's checkpoint: with less free, nothing useful can be written.
_LEAST_FREE_BYTES = GIB
# With fewer left, a few more workers or commands are refused.
_FEW_CONNECTIONS = 10


def examine(settings: Settings, *, gpus: Sequence[VisibleGpu], stack_runs: bool) -> Iterable[Check]:
    """Yield all checks that need no heavy import.

    ``gpus``: those that NVML lists. ``stack_runs``: whether the embedded stack of this home is running.
    """
    yield from versions()
    yield cuda(gpus)
    yield _folder("home", settings.home)
    yield _folder("storage", settings.storage)
    yield _file_system(settings.storage)
    yield from _locks(settings)
    yield _broker(settings, stack_runs)
    database_checks, database_health = _database(settings)
    yield from database_checks
    yield from _spool(settings)
    if database_health is not None:
        yield from _service(database_health, services_expected=not settings.is_embedded or stack_runs)


# Folders and disks


def _folder(name: str, folder: Path) -> Check:
    """Check that files can be written to ``folder``, and how much space is free. Leaves nothing behind."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            space = disk_space(place)
    except OSError as error:
        return check(name, State.WRONG, f"{folder} cannot be written: {error.strerror}")
    free = "its file system does not report free space" if space is None else f"{show_bytes(space.free)} free"
    message = f"{folder}, {free}" + ("" if place == folder else "; created when it is first needed")
    if space is not None and space.free < _LEAST_FREE_BYTES:
        return check(name, State.WRONG, f"{message}: less than {show_bytes(_LEAST_FREE_BYTES)}")
    return check(name, State.OK, message)


def _existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    # Of what may not be looked at, ``Path.exists`` raises that, and this says that it is not there.
    return next((place for place in (folder, *folder.parents) if os.path.exists(place)), folder)  # noqa: PTH110


def _file_system(storage: Path) -> Check:
    """Check which operations the file system of ``storage`` refuses. Leaves nothing behind."""
    try:
        refused = probe(_existing(storage))
    except StorageUnavailable as error:
        return check("file system", State.WRONG, str(error))
    if refused:
        refusals = "; ".join(_WITHOUT[refusal] for refusal in sorted(refused))
        return check("file system", State.NOTE, f"the file system of the storage refuses {refusals}")
    return check("file system", State.OK, "the file system of the storage supports everything that checkpoints need")


def _locks(settings: Settings) -> Iterable[Check]:
    """Check that file locks work in the folders that belong to this machine alone."""
    for folder, what, variable in (
        (settings.home, "the stack", "QBATCH_HOME"),
        (settings.cache, "the cache of sources", "QBATCH_CACHE"),
    ):
        try:
            require_locks(_existing(folder), what, variable)
        except StorageUnavailable as error:
            yield check("locks", State.WRONG, str(error))


# Broker and database


def _broker(settings: Settings, stack_runs: bool) -> Check:
    place = broker_place(settings)
    # A running stack may have been started with another environment: then the link to its socket is right.
    folder = settings.socket.parent.resolve() if stack_runs else settings.socket_dir
    fault = why_not_private(folder) if settings.is_embedded else None
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
        # The text of the error may contain the URL, and with it the password.
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
    """The checks of the database, and its health record if it can be read."""
    try:
        database = Database(settings.sqlalchemy_url)
    except UsageError as error:
        return [check("database", State.WRONG, str(error))], None
    share = share_of(database.file)
    warnings = [check("database's disk", State.NOTE, share.warning)] if share is not None else []
    try:
        if share is not None:
            share.check(settings.lease_s)
        database_check, database_health = _query(database, settings)
        counted = [] if database.is_sqlite else [_connections(database)]
    except DatabaseUnreachable as error:
        return [*warnings, check("database", State.WRONG, str(error))], None
    finally:
        database.dispose()
    return [*warnings, database_check, *counted], database_health


def _connections(database: Database) -> Check:
    """Check that the server has connections left for more workers. Raises DatabaseUnreachable."""
    with database.read() as session:
        count = count_connections(session)
    message = f"{count.used} of {count.limit} are in use; each worker and scheduler needs one, a command up to two"
    if count.limit - count.used < _FEW_CONNECTIONS:
        return check("connections", State.NOTE, f"{message}: {ADVICE}")
    return check("connections", State.OK, message)


def _query(database: Database, settings: Settings) -> tuple[Check, Health | None]:
    """The check of a database that answers, and its health record unless its schema is old.

    Raises DatabaseUnreachable.
    """
    if database.is_behind():
        return _behind(database, database.schema_version()), None
    version = database.schema_version()
    with database.read() as session:
        database_health = health(session, settings.lease_s, lead_s=settings.lead_s)
    newer = f", newer than this qbatch's {SCHEMA_HEAD}, which works with it" if version != SCHEMA_HEAD else ""
    return check("database", State.OK, f"{database.place}, schema {version}{newer}"), database_health


def _behind(database: Database, version: str | None) -> Check:
    if database.is_sqlite and version is None:
        return check("database", State.NOTE, f"{database.place}: none yet; created when it is first needed")
    versions = f"{database.place} is at schema {version or 'none'}, this qbatch needs {SCHEMA_HEAD}"
    if database.is_sqlite:
        return check("database", State.NOTE, f"{versions}; the next command upgrades it")
    return check("database", State.WRONG, f"{versions}: run `qbatch db upgrade`")


def _spool(settings: Settings) -> Iterable[Check]:
    """Check for outcomes that this machine's workers could not yet record in the database."""
    waiting = sorted(settings.spool.glob("*.json"))
    if waiting:
        message = f"outcomes in {settings.spool} that a worker of this home has yet to record: {len(waiting)}"
        yield check("spool", State.NOTE, message)
    for aside in sorted(settings.spool.glob("*.rejected")):
        message = f"{aside} could not be recorded and was set aside: rename it to .json to try again, or delete it"
        yield check("spool", State.WRONG, message)


# Scheduler, workers and jobs


def _service(report: Health, *, services_expected: bool) -> Iterable[Check]:
    """``services_expected``: a scheduler should run even while there is nothing to do."""
    if report.ahead_s is not None:
        yield check("clock", State.WRONG, _clock(report.ahead_s))
    has_work = bool(report.open_jobs)
    yield _scheduler(report, services_expected or has_work)
    yield from _workers(report, has_work)
    jobs = ", ".join(f"{count} {state}" for state, count in report.open_jobs.items())
    yield check("jobs", State.OK, jobs or "no job is waiting or running")
    failed = ", ".join(f"{count} {kind}" for kind, count in report.failed.items())
    yield check("failures", State.NOTE if failed else State.OK, f"in the last 24 hours: {failed or 'none'}")
    for pause in report.pauses:
        yield check("pause", State.WRONG, _pause(pause))


def _scheduler(report: Health, is_needed: bool) -> Check:
    if report.leader is not None:
        return check("scheduler", State.OK, f"{report.leader} is active")
    state = State.WRONG if is_needed else State.NOTE
    return check("scheduler", state, "no scheduler is active, so nothing is dispatched or retried")


def _workers(report: Health, has_work: bool) -> Iterable[Check]:
    ready = [worker for worker in report.workers if worker["state"] == WorkerState.READY]
    if ready:
        yield check("workers", State.OK, f"{len(ready)} ready: {', '.join(worker['worker'] for worker in ready)}")
    else:
        state = State.WRONG if has_work else State.NOTE
        waiting = ", and jobs are waiting; one that has just started needs up to a minute" if has_work else ""
        yield check("workers", state, f"no worker is ready{waiting}")
    lacking = why_lacking({format_batch_id(batch_id): kind for batch_id, kind in report.lacking.items()})
    if lacking is not None:
        yield check("devices", State.WRONG, lacking)
    for worker in report.workers:
        if worker["state"] == WorkerState.QUARANTINED:
            yield check(worker["worker"], State.WRONG, f"quarantined: {worker['note'] or 'no reason is on record'}")
        elif worker["state"] == LOST and (worker["jobs"] or _is_of_today(worker["heartbeat_at"])):
            held = f", holding {', '.join(worker['jobs'])}" if worker["jobs"] else ""
            note = f"; {worker['note']}" if worker["note"] else ""
            yield check(worker["worker"], State.NOTE, f"silent since {show_time(worker['heartbeat_at'])}{held}{note}")


def _clock(ahead_s: float) -> str:
    return (
        f"leases or heartbeats lie {ahead_s:.0f} s further in the future than new ones would: either the clock "
        "of the database was set back, which a running scheduler corrects within one lease, or QBATCH_LEASE_S or "
        "QBATCH_SCAN_S is smaller here than on other machines"
    )


def _is_of_today(iso: str) -> bool:
    # Workers that were killed stay on record for ever.
    return datetime.now(UTC) - datetime.fromisoformat(iso) < timedelta(days=1)


def _pause(pause: PauseNote) -> str:
    return f"dispatch has been paused since {show_time(pause.since.isoformat())}: {pause.message}"

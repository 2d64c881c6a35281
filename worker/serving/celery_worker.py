"""One Celery worker on one device, which the environment pins."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
from celery import signals
from celery.platforms import EX_OK
from celery.worker import state as celery_state
from sqlalchemy.orm import Session

from qbatch.core.domain import DeviceKind, WorkerState
from qbatch.core.errors import (
    DatabaseRefused,
    DatabaseReplaced,
    DatabaseUnreachable,
    NoSuchDevice,
    QbatchError,
    StorageError,
    StorageUnavailable,
    UsageError,
    WrongDatabase,
)
from qbatch.core.filesystem import probe, require_locks
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, leases, workers
from qbatch.models_db.database_id import database_id
from qbatch.models_db.network_share import share_of
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker as WorkerRow
from qbatch.models_db.workers import WorkerInfo
from qbatch.scheduler.__main__ import hold_share, wait_for_schema
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import queues_of
from qbatch.scheduler.stop import Stop
from qbatch.worker.files.own_staging import OwnStaging
from qbatch.worker.machine.gpu import installed_gpus
from qbatch.worker.machine.logs import log_to_stderr
from qbatch.worker.serving import celery_task as tasks
from qbatch.worker.serving.environment import has_database_password, without_secrets
from qbatch.worker.serving.leaving import Leaving
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.sockets import own_sockets
from qbatch.worker.serving.supervisor import WorkerContext

log = logging.getLogger("qbatch.worker")

_PRELOAD = ["qbatch.worker.serving.ignore_sigterm", "qbatch.worker.serving.runner_imports"]
# A CPU's worker has no CUDA to keep away from: what each of its runners would import again, 1.2 s of a core.
_PRELOAD_ON_CPU = [*_PRELOAD, "qbatch.worker.serving.cpu_runner_imports"]
_DATABASE_RETRY_S = 2.0
_NOT_IMPORTED, _CUDA_INITIALISED = 1, 2


def main(uuid: str | None, *, drain: bool) -> int:
    """Serve the GPU of that UUID, or the CPU, until told to stop; the exit code."""
    log_to_stderr()
    try:
        settings = Settings.from_env(os.environ)
        check_surroundings(settings)
        _drop_secrets(settings)
        return CeleryWorker(settings, uuid, drain=drain).run()
    except QbatchError as error:
        print(f"qbatch worker: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def _drop_secrets(settings: Settings) -> None:
    """From here on they are in ``settings`` alone: the forkserver, whenever one starts, has this environment.

    Raises UsageError where the database could then not be signed in to.
    """
    if has_database_password(os.environ) and not settings.sqlalchemy_url.startswith("sqlite"):
        raise UsageError("a worker would hand PGPASSWORD on to its runners: put the password into QBATCH_DATABASE_URL")
    kept = without_secrets(os.environ)
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]


def check_surroundings(settings: Settings) -> None:
    """Raises UsageError for SQLite beside a remote broker, StorageUnavailable where nothing can be published or a file
    system lacks what is needed."""
    if not settings.is_one_machine and settings.sqlalchemy_url.startswith("sqlite"):
        raise UsageError("SQLite is for one machine, and this broker is on another: set QBATCH_DATABASE_URL")
    try:
        for folder in (settings.home, settings.checkpoints, settings.staging, settings.logs):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StorageUnavailable(f"{folder} is not writable")
    except OSError as error:
        raise StorageUnavailable(f"{error.filename}: {error.strerror}") from error
    for refusal in sorted(probe(settings.staging)):
        log.info("the storage's file system refuses %s; it is done without", refusal)
    require_locks(settings.cache, "the cache of sources", "QBATCH_CACHE")


def describe(uuid: str | None) -> WorkerInfo:
    """This worker as it introduces itself. Raises NoSuchDevice for a GPU that is not there."""
    host = socket.gethostname()
    # Hosts behind one name (host networking) may give the same pid: the name holds the GPU's lease, and must differ.
    suffix = secrets.token_hex(2)
    common = {"host": host, "pid": os.getpid(), "pid_space": pid_space()}
    if uuid is None:
        return WorkerInfo(
            name=f"cpu-{os.getpid()}-{suffix}@{host}",
            device_kind=DeviceKind.CPU,
            device_name=cpu_name(),
            device_uuid=None,
            memory_bytes=psutil.virtual_memory().total,
            **common,  # type: ignore[arg-type]
        )
    gpu = next((gpu for gpu in installed_gpus() if gpu.uuid == uuid), None)
    if gpu is None:
        raise NoSuchDevice(f"no GPU {uuid} on this machine")
    return WorkerInfo(
        name=f"gpu{gpu.index}-{os.getpid()}-{suffix}@{host}",
        device_kind=DeviceKind.CUDA,
        device_name=gpu.name,
        device_uuid=gpu.uuid,
        memory_bytes=gpu.memory_bytes,
        **common,  # type: ignore[arg-type]
    )


def pid_space() -> str:
    """Where a pid means this process: a boot and a pid namespace. Two containers of one host name differ."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{psutil.boot_time():.0f}"


def cpu_name() -> str:
    """The processor's name, with its count of usable cores: both decide how fast it is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()} ({cores} cores)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _stop_consuming(consumer: Any, queues: Sequence[str]) -> None:
    """Have a Celery consumer leave its queues. To be called again: a connection that breaks just then forgets it."""
    tasks_of = consumer.task_consumer
    for queue in queues:
        if tasks_of is not None and tasks_of.consuming_from(queue):
            consumer.call_soon(consumer.cancel_task_queue, queue)


def _as_a_runner() -> None:
    """Exits as a runner would find things. A fork of a process that has initialised CUDA cannot use it."""
    if "qbatch.worker.serving.runner_imports" not in sys.modules:
        sys.exit(_NOT_IMPORTED)
    sys.exit(_CUDA_INITIALISED if sys.modules["torch"].cuda._is_in_bad_fork() else 0)


class CeleryWorker:
    """A registered Celery worker. ``run`` once."""

    def __init__(self, settings: Settings, uuid: str | None, *, drain: bool) -> None:
        self._settings = settings
        self._info = describe(uuid)
        self._drain = drain
        # Frozen, or with its host gone, it must not keep locked what others are to take up.
        self._database = Database(settings.sqlalchemy_url, frozen_s=settings.lease_s)
        self._share = share_of(self._database.file)
        self._recorder = Recorder(self._database, settings)
        self._staging: OwnStaging | None = None
        # Workers of this machine whose processes are no more.
        self._gone: set[str] = set()
        self._stopping = Stop()
        self._leaving = Leaving()
        self._ended = threading.Event()

    def run(self) -> int:
        """Until told to stop; the exit code. Raises WrongDatabase once it has left a database that is not its own."""
        self._refuse_early()
        context = self._preload()
        # Celery handles signals once it runs; until then a stop must end the waiting.
        self._stopping.heed_signals()
        wait_for_schema(self._database, self._stopping)
        worker_id = self._register()
        if worker_id is None:
            self._leave(None)
            return 0
        self._sweep()
        if self._stopping.is_set():
            self._leave(worker_id)
            return 0
        app = make_app(self._settings)
        station = WorkerContext(
            database=self._database,
            settings=self._settings,
            recorder=self._recorder,
            worker_id=worker_id,
            device_kind=self._info.device_kind,
            device_name=self._info.device_name,
            staging=self._own_staging().folder,
            forkserver=context,
            stopping=self._stopping,
            leaving=self._leaving,
        )
        tasks.register(app, station)
        queues = queues_of(self._info.device_kind, self._info.memory_bytes)
        celery_worker = app.Worker(
            pool="threads",
            concurrency=1,
            queues=queues,
            hostname=self._info.name,
            loglevel="INFO",
            task_events=True,
            without_gossip=True,
            without_mingle=True,
            quiet=True,
        )
        signals.worker_ready.connect(self._on_ready, weak=False)
        beats = threading.Thread(
            target=self._beat,
            args=(worker_id, lambda: _stop_consuming(celery_worker.consumer, queues)),
            name="beat",
        )
        beats.start()
        try:
            celery_worker.start()
        finally:
            self._ended.set()
            beats.join()
            self._keep_what_is_in_memory()
            self._leave(worker_id)
        if self._leaving.why is not None:
            raise self._leaving.why
        return int(celery_worker.exitcode or 0)

    def _refuse_early(self) -> None:
        """Raises WrongDatabase before the imports, which take long enough to be spared for a refusal."""
        try:
            hold_share(self._database, self._settings)
            self._database.is_behind()
        except WrongDatabase:
            raise
        except DatabaseUnreachable as error:
            log.warning("%s; it is waited for", error)

    def _keep_what_is_in_memory(self) -> None:
        """Nobody asked us to leave at once: stay until the disk or the database takes what only we know."""
        while self._recorder.has_in_memory and self._leaving.why is not None and not self._stopping.is_set():
            try:
                self._recorder.replay()
            except DatabaseUnreachable as error:
                log.warning("%s; waiting for it, or for room on the disk", error)
            self._stopping.wait(_DATABASE_RETRY_S)
        for job_id in self._recorder.lost():
            log.error("the outcome of j%s goes with this worker: neither the database nor the disk took it", job_id)

    def _preload(self) -> multiprocessing.context.ForkServerContext:
        context = multiprocessing.get_context("forkserver")
        is_cpu = self._info.device_kind is DeviceKind.CPU
        context.set_forkserver_preload(_PRELOAD_ON_CPU if is_cpu else _PRELOAD)
        # Waited for, so that no claimed job waits for the imports while its lease runs.
        first = context.Process(target=_as_a_runner, daemon=True)
        with own_sockets(Path(f"{self._settings.socket_dir}-{pid_space().rpartition(':')[2]}")):
            first.start()
        first.join()
        if first.exitcode == _CUDA_INITIALISED:
            raise NoSuchDevice("runners could not use the GPU: something that they import initialises CUDA too early")
        if first.exitcode:
            raise UsageError("runners cannot import what they need: `qbatch doctor` says what is missing")
        return context

    def _register(self) -> int | None:
        """Introduce ourselves, holding the GPU's lease; None if told to stop while waiting for it."""
        said = False
        while not self._stopping.is_set():
            try:
                # A predecessor's outcomes count before it is taken for lost with its jobs.
                self._recorder.replay()
                self._own_staging()
                with self._database.write() as session:
                    self._database.require_own(session)
                    for predecessor in workers.dead_here(session, self._info, psutil.pid_exists):
                        self._bury(session, predecessor)
                    if self._holds_device(session):
                        return workers.register(session, self._info)
                if not said:
                    log.warning("GPU %s belongs to another worker; waiting for its lease", self._info.device_uuid)
                    said = True
            except WrongDatabase:
                raise
            except DatabaseUnreachable as error:
                log.warning("%s; waiting for it", error)
            self._stopping.wait(_DATABASE_RETRY_S)
        return None

    def _own_staging(self) -> OwnStaging:
        """Where this worker stages, made when it is first asked for. Raises DatabaseUnreachable, StorageUnavailable."""
        if self._staging is None:
            with self._database.write() as session:
                place = self._settings.staging_of(database_id(session))
            self._staging = OwnStaging(
                place, self._info.name, lease_s=self._settings.lease_s, renew_s=self._settings.heartbeat_s
            ).start()
        return self._staging

    def _held(self, tokens: Iterable[jobs.Token]) -> frozenset[int]:
        with self._database.read() as session:
            self._database.require_same(session)
            return jobs.held(session, tokens)

    def _sweep(self) -> None:
        """Remove what killed runners left; outside any transaction, since deleting gigabytes takes its time."""
        try:
            removed = self._own_staging().sweep(self._held, gone=self._gone)
        except (DatabaseUnreachable, StorageError) as error:
            log.warning("%s; the staging folder is not swept", error)
            return
        for name in removed:
            log.info("removed what attempt %s had left in the staging folder", name)

    def _bury(self, session: Session, predecessor: WorkerRow) -> None:
        """A worker of this machine that is gone for certain: its jobs need not wait for their leases."""
        jobs.expire(
            session,
            backoff_s=self._settings.backoff_s,
            max_failures=self._settings.max_failures,
            worker_id=predecessor.id,
        )
        if predecessor.device_uuid is not None:
            leases.release(session, leases.of_gpu(predecessor.device_uuid), predecessor.name)
        workers.leave(session, predecessor.id, WorkerState.STOPPED)
        self._gone.add(predecessor.name)

    def _holds_device(self, session: Session) -> bool:
        if self._info.device_uuid is None:
            return True
        lease, ttl_s = leases.of_gpu(self._info.device_uuid), self._settings.lease_s
        holder = leases.cut(session, lease, ttl_s)
        if holder not in (None, self._info.name):
            log.warning("%s holds %s from before the database's clock was set back; for %g s", holder, lease, ttl_s)
        return leases.acquire(session, lease, self._info.name, ttl_s)

    def _on_ready(self, **_: object) -> None:
        # In place of Celery's handlers, which would tell us under a lock: there a second signal waited for it for ever.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # Told to stop when Celery did not handle signals yet: it has not heard of it.
        if self._stopping.is_set():
            celery_state.should_stop = EX_OK

    def _on_signal(self, *_: object) -> None:
        # Warm shutdown waits for the running task, which then stops its runner and hands the jobs back.
        if not self._drain:
            self._stopping.set()
        celery_state.should_stop = EX_OK

    def _beat(self, worker_id: int, stop_consuming: Callable[[], None]) -> None:
        is_quarantined = said_good_bye = False
        sweep_at = time.monotonic() + self._settings.lease_s
        while not self._ended.wait(self._settings.heartbeat_s / 3):
            try:
                state = self._renew(worker_id)
                self._recorder.replay()
                if time.monotonic() >= sweep_at:
                    # What a host that never came back had begun.
                    self._sweep()
                    sweep_at = time.monotonic() + self._settings.lease_s
                if state == WorkerState.QUARANTINED:
                    if not is_quarantined:
                        log.error("this worker is quarantined: its device failed twice in a row")
                    is_quarantined = True
                    stop_consuming()
            except WrongDatabase as error:
                self._leaving.because(error)
            except DatabaseUnreachable as error:
                log.warning("%s; the worker goes on", error)
            except Exception:
                # A thread that died here would let a healthy worker be taken for lost.
                log.exception("renewing this worker's heartbeat")
            if self._leaving.why is not None and not said_good_bye:
                self._say_good_bye(worker_id, self._leaving.why)
                said_good_bye = True

    def _renew(self, worker_id: int) -> str:
        """Renew what is ours, also where the schema is no longer: what runs may need hours yet. Raises WrongDatabase
        then, the heartbeat being renewed where the schema takes it, and in no other database."""
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                state = workers.beat(session, worker_id)
                holds = self._holds_device(session)
        except DatabaseRefused as error:
            raise explain(self._database, error) from error
        if not holds:
            log.error("another worker took over GPU %s while this one was silent; leaving", self._info.device_uuid)
            self._stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)
        with self._database.read() as session:
            self._database.require_own(session)
        if self._share is not None:
            self._share.hold(self._settings.lease_s)
        return state

    def _say_good_bye(self, worker_id: int, why: WrongDatabase) -> None:
        """Take no more jobs, finish what runs and leave. What runs on a database that is gone is for nobody."""
        log.error("%s; this worker takes no more jobs and leaves", why)
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                workers.leave(session, worker_id, WorkerState.DRAINING, f"takes no more jobs: {why}")
        except DatabaseUnreachable as error:
            log.warning("%s; the list of workers does not say so", error)
        if isinstance(why, DatabaseReplaced):
            self._stopping.set()
        # Celery's warm shutdown, as a signal would begin it.
        celery_state.should_stop = EX_OK

    def _leave(self, worker_id: int | None) -> None:
        if self._staging is not None:
            self._staging.close()
        if worker_id is None:
            return
        # One that left by itself stays in the list, with its reason, until the next one on this machine starts.
        why = self._leaving.why
        state, note = (WorkerState.STOPPED, None) if why is None else (WorkerState.DRAINING, f"left: {why}")
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                workers.leave(session, worker_id, state, note)
                if self._info.device_uuid is not None:
                    leases.release(session, leases.of_gpu(self._info.device_uuid), self._info.name)
        except DatabaseUnreachable as error:
            log.warning("%s; leaving without a word", error)

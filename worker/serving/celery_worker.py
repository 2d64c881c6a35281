"""A Celery worker on one device, selected by the environment."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.context import ForkServerContext
from typing import Any

import psutil
from celery import signals
from celery.platforms import EX_OK
from celery.worker import state as celery_state
from sqlalchemy.orm import Session

from qbatch.core.domain import WorkerState
from qbatch.core.errors import (
    DatabaseRefused,
    DatabaseReplaced,
    DatabaseUnreachable,
    StorageError,
    WrongDatabase,
)
from qbatch.core.settings import Settings
from qbatch.models_db import jobs, leases, workers
from qbatch.models_db.database_id import database_id
from qbatch.models_db.network_share import share_of
from qbatch.models_db.schema_fit import explain
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Worker as WorkerRow
from qbatch.scheduler.__main__ import hold_share, wait_for_schema
from qbatch.scheduler.celery_app import make_app
from qbatch.scheduler.queues import queues_of
from qbatch.scheduler.stop import Stop
from qbatch.worker.files.own_staging import OwnStaging
from qbatch.worker.machine.device_meter import read_load
from qbatch.worker.serving import celery_task as tasks
from qbatch.worker.serving.broker_wait import await_broker
from qbatch.worker.serving.next_source import NextSource
from qbatch.worker.serving.recorder import Recorder
from qbatch.worker.serving.runner_forkserver import await_imports
from qbatch.worker.serving.runners import Runners
from qbatch.worker.serving.shutdown import Shutdown
from qbatch.worker.serving.supervisor import WorkerContext
from qbatch.worker.serving.worker_description import describe_worker

log = logging.getLogger("qbatch.worker")

_DATABASE_RETRY_S = 2.0


def _stop_consuming(consumer: Any, queues: Sequence[str]) -> None:
    """Make a Celery consumer stop reading its queues. Call it repeatedly, because a reconnection undoes it."""
    tasks_of = consumer.task_consumer
    for queue in queues:
        if tasks_of is not None and tasks_of.consuming_from(queue):
            consumer.call_soon(consumer.cancel_task_queue, queue)


class CeleryWorker:
    """A registered Celery worker. Call ``run`` once."""

    def __init__(self, settings: Settings, uuid: str | None, forkserver: ForkServerContext, *, drain: bool) -> None:
        self._settings = settings
        self._forkserver = forkserver
        self._info = describe_worker(uuid)
        self._drain = drain
        # If this process freezes or its host fails, its locks on the database must be released.
        self._database = Database(settings.sqlalchemy_url, frozen_s=settings.lease_s)
        self._share = share_of(self._database.file)
        self._recorder = Recorder(self._database, settings)
        self._staging: OwnStaging | None = None
        # The names of workers of this machine whose processes no longer exist.
        self._dead_workers: set[str] = set()
        self._stopping = Stop()
        self._shutdown = Shutdown()
        self._ended = threading.Event()

    def run(self) -> int:
        """Run until told to stop, and return the exit code.

        Raises WrongDatabase after leaving because the database has been replaced or has another schema.
        """
        self._check_database_early()
        # It takes from five seconds to half a minute, in which a log that says nothing looks like one that hangs.
        log.info("%s on %s: importing what runners need", self._info.name, self._info.device_name)
        await_imports(self._forkserver)
        # Celery handles signals once it runs; until then a signal must end the waiting below.
        self._stopping.set_on_signals()
        wait_for_schema(self._database, self._stopping)
        worker_id = self._register()
        if worker_id is None:
            self._leave(None)
            return 0
        self._sweep()
        if self._stopping.is_set():
            self._leave(worker_id)
            return 0
        return self._serve(worker_id, Runners(self._forkserver, self._info.device_kind))

    def _serve(self, worker_id: int, runners: Runners) -> int:
        """Take bundles until told to stop, and return Celery's exit code."""
        app = make_app(self._settings)
        queues = queues_of(self._info.device_kind, self._info.memory_bytes)
        next_source = NextSource(
            database=self._database,
            settings=self._settings,
            runners=runners,
            worker_id=worker_id,
            queues=tuple(queues),
        )
        tasks.register(app, self._context(worker_id, runners, next_source))
        celery_worker = self._celery_worker(app, queues)
        beats = threading.Thread(
            target=self._beat,
            args=(worker_id, lambda: _stop_consuming(celery_worker.consumer, queues)),
            name="beat",
        )
        beats.start()
        try:
            await_broker(self._settings, self._pause)
            if not self._pause(0):
                runners.stand_by()
                celery_worker.start()
        finally:
            self._ended.set()
            runners.close()
            next_source.close()
            beats.join()
            self._save_outcomes_in_memory()
            self._leave(worker_id)
        if self._shutdown.reason is not None:
            raise self._shutdown.reason
        return int(celery_worker.exitcode or 0)

    def _context(self, worker_id: int, runners: Runners, next_source: NextSource) -> WorkerContext:
        return WorkerContext(
            database=self._database,
            settings=self._settings,
            recorder=self._recorder,
            worker_id=worker_id,
            device_kind=self._info.device_kind,
            device_name=self._info.device_name,
            staging=self._own_staging().folder,
            runners=runners,
            next_source=next_source,
            stopping=self._stopping,
            shutdown=self._shutdown,
            device_uuid=self._info.device_uuid,
        )

    def _celery_worker(self, app: Any, queues: Sequence[str]) -> Any:
        """Celery's own worker, which does not run yet."""
        signals.worker_ready.connect(self._on_ready, weak=False)
        return app.Worker(
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

    def _pause(self, seconds: float) -> bool:
        """Wait for that time. Returns whether it is time to leave."""
        return self._stopping.wait(seconds) or self._shutdown.reason is not None

    def _check_database_early(self) -> None:
        """Raise WrongDatabase before the wait in ``await_imports``, which takes a while."""
        try:
            hold_share(self._database, self._settings)
            self._database.is_behind()
        except WrongDatabase:
            raise
        except DatabaseUnreachable as error:
            log.warning("%s; continuing, and waiting for it later", error)

    def _save_outcomes_in_memory(self) -> None:
        """Wait until the disk or the database accepts outcomes that are only in memory, unless told to stop."""
        while self._recorder.has_in_memory and self._shutdown.reason is not None and not self._stopping.is_set():
            try:
                self._recorder.replay()
            except DatabaseUnreachable as error:
                log.warning("%s; waiting for it, or for free disk space", error)
            self._stopping.wait(_DATABASE_RETRY_S)
        for job_id in self._recorder.lost():
            log.error("the outcome of j%s is lost: neither the database nor the disk accepted it", job_id)

    def _register(self) -> int | None:
        """Register this worker and acquire the lease of its GPU. Returns None if told to stop while waiting for it."""
        has_warned = False
        while not self._stopping.is_set():
            try:
                # Record the outcomes that a dead predecessor has spooled before its jobs are taken back.
                self._recorder.replay()
                self._own_staging()
                with self._database.write() as session:
                    self._database.require_own(session)
                    for predecessor in workers.dead_here(session, self._info, psutil.pid_exists):
                        self._release_jobs_of(session, predecessor)
                    if self._holds_device(session):
                        return workers.register(session, self._info)
                if not has_warned:
                    log.warning("GPU %s is in use by another worker; waiting for its lease", self._info.device_uuid)
                    has_warned = True
            except WrongDatabase:
                raise
            except DatabaseUnreachable as error:
                log.warning("%s; waiting for it", error)
            self._stopping.wait(_DATABASE_RETRY_S)
        return None

    def _own_staging(self) -> OwnStaging:
        """This worker's staging folder, created on first use. Raises DatabaseUnreachable or StorageUnavailable."""
        if self._staging is None:
            with self._database.write() as session:
                folder = self._settings.staging_of(database_id(session))
            self._staging = OwnStaging(
                folder, self._info.name, lease_s=self._settings.lease_s, renew_s=self._settings.heartbeat_s
            ).start()
        return self._staging

    def _held_jobs(self, tokens: Iterable[jobs.Token]) -> frozenset[int]:
        with self._database.read() as session:
            self._database.require_same(session)
            return jobs.held(session, tokens)

    def _sweep(self) -> None:
        """Remove files that killed runners left. Not in a transaction, because deleting gigabytes takes time."""
        try:
            removed = self._own_staging().sweep(self._held_jobs, gone=self._dead_workers)
        except (DatabaseUnreachable, StorageError) as error:
            log.warning("%s; the staging folder is not cleaned up now", error)
            return
        for name in removed:
            log.info("removed the staged files of attempt %s", name)

    def _release_jobs_of(self, session: Session, predecessor: WorkerRow) -> None:
        """Take back the jobs of a worker of this machine whose process no longer exists, before their leases end."""
        jobs.expire(session, limits=self._settings.retry_limits, worker_id=predecessor.id)
        if predecessor.device_uuid is not None:
            leases.release(session, leases.of_gpu(predecessor.device_uuid), predecessor.name)
        workers.leave(session, predecessor.id, WorkerState.STOPPED)
        self._dead_workers.add(predecessor.name)

    def _holds_device(self, session: Session) -> bool:
        if self._info.device_uuid is None:
            return True
        lease, ttl_s = leases.of_gpu(self._info.device_uuid), self._settings.lease_s
        holder = leases.cut(session, lease, ttl_s)
        if holder not in (None, self._info.name):
            log.warning(
                "the lease %s of %s was too long, since the database's clock was set back; it is cut to %g s",
                lease,
                holder,
                ttl_s,
            )
        return leases.acquire(session, lease, self._info.name, ttl_s)

    def _on_ready(self, **_: object) -> None:
        # These replace Celery's handlers, which call ours while holding a lock: a second signal then deadlocked on it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        # A signal that arrived before Celery handled signals has not reached it.
        if self._stopping.is_set():
            celery_state.should_stop = EX_OK

    def _on_signal(self, *_: object) -> None:
        # Celery's warm shutdown waits for the running task, which then stops its runner and returns its jobs.
        if not self._drain:
            self._stopping.set()
        celery_state.should_stop = EX_OK

    def _beat(self, worker_id: int, stop_consuming: Callable[[], None]) -> None:
        is_quarantined = has_announced = False
        read_load(self._info.device_uuid)  # since this call counts the load that the first heartbeat reports
        interval_s = self._settings.heartbeat_s / 3
        renew_at = time.monotonic()
        sweep_at = time.monotonic() + self._settings.lease_s
        while not self._ended.wait(interval_s):
            try:
                # Every third time, since most of what a fleet writes are heartbeats. After a failure, the next time.
                if time.monotonic() >= renew_at:
                    self._renew(worker_id)
                    renew_at = time.monotonic() + 2.5 * interval_s
                state = self._look(worker_id)
                self._recorder.replay()
                if time.monotonic() >= sweep_at:
                    # Also files of hosts that failed and never came back.
                    self._sweep()
                    sweep_at = time.monotonic() + self._settings.lease_s
                if state == WorkerState.QUARANTINED:
                    if not is_quarantined:
                        log.error("this worker is quarantined and takes no more jobs: its device failed twice in a row")
                    is_quarantined = True
                    stop_consuming()
            except WrongDatabase as error:
                self._shutdown.request(error)
            except DatabaseUnreachable as error:
                log.warning("%s; this worker continues", error)
            except Exception:
                # If this thread ended, a healthy worker would be considered lost.
                log.exception("this worker's heartbeat could not be renewed")
            if self._shutdown.reason is not None and not has_announced:
                self._announce_shutdown(worker_id, self._shutdown.reason)
                has_announced = True

    def _renew(self, worker_id: int) -> None:
        """Renew the heartbeat and the GPU's lease.

        Raises WrongDatabase if the database was replaced or its schema does not fit. With a schema that does not fit,
        the heartbeat is still renewed if the schema permits, because a running job may need hours yet; a database that
        replaced ours is not touched.
        """
        load = read_load(self._info.device_uuid)
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                workers.beat(session, worker_id, load)
                holds = self._holds_device(session)
        except DatabaseRefused as error:
            raise explain(self._database, error) from error
        if not holds:
            log.error(
                "this worker stops: it did not renew its lease in time, and another one took over GPU %s",
                self._info.device_uuid,
            )
            self._stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)
        if self._share is not None:
            self._share.hold(self._settings.lease_s)

    def _look(self, worker_id: int) -> str:
        """The state of this worker's row, which others may have changed. Raises WrongDatabase as ``_renew`` does."""
        with self._database.read() as session:
            self._database.require_own(session)
            return workers.state_of(session, worker_id)

    def _announce_shutdown(self, worker_id: int, why: WrongDatabase) -> None:
        """Take no more jobs, finish the running ones and stop. If the database was replaced, stop running jobs too."""
        log.error("%s; this worker takes no more jobs and stops", why)
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                workers.leave(session, worker_id, WorkerState.DRAINING, f"takes no more jobs: {why}")
        except DatabaseUnreachable as error:
            log.warning("%s; the list of workers does not show that this one is stopping", error)
        if isinstance(why, DatabaseReplaced):
            self._stopping.set()
        # Start Celery's warm shutdown, as a signal would.
        celery_state.should_stop = EX_OK

    def _leave(self, worker_id: int | None) -> None:
        if self._staging is not None:
            self._staging.close()
        if worker_id is None:
            return
        # A worker that stopped by itself stays listed with its reason until the next one on this machine starts.
        why = self._shutdown.reason
        state, note = (WorkerState.STOPPED, None) if why is None else (WorkerState.DRAINING, f"left: {why}")
        try:
            with self._database.write() as session:
                self._database.require_same(session)
                workers.leave(session, worker_id, state, note)
                if self._info.device_uuid is not None:
                    leases.release(session, leases.of_gpu(self._info.device_uuid), self._info.name)
        except DatabaseUnreachable as error:
            log.warning("%s; this worker stops without recording it", error)

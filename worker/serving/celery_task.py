"""The Celery task: claim, supervise a runner, record."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from celery import Celery
from celery.worker import control

from qbatch.core.domain import Claim, format_job_id
from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, WrongDatabase
from qbatch.models_db import jobs, window
from qbatch.models_db.batches import are_of_one_model
from qbatch.models_db.schema_fit import explain
from qbatch.scheduler.queues import RUN_BUNDLE
from qbatch.worker.serving.message_vet import Commands
from qbatch.worker.serving.supervisor import Supervisor, WorkerContext

log = logging.getLogger("qbatch.worker")

_DATABASE_WAIT_S = 3.0
_CONSUMER = "qbatch.worker.serving.message_vet:Consumer"


class BundleFailed(Exception):
    """A job of the bundle failed. It is recorded; this only keeps Celery and Flower from calling it a success."""


def register(app: Celery, station: WorkerContext) -> None:
    """Have ``app`` run bundles at ``station``, and nothing else: what else a message may ask for is refused."""

    @app.task(name=RUN_BUNDLE, bind=True, throws=(BundleFailed,))  # type: ignore[untyped-decorator]
    def run_bundle(task: Any, job_ids: list[int]) -> str:
        return _run_bundle(station, task.request.id, job_ids)

    app.conf.worker_consumer = _CONSUMER
    app.finalize()
    # Celery brings tasks of its own, which run others.
    for name in app.tasks.keys() - {RUN_BUNDLE}:
        app.tasks.unregister(name)
    control.Panel.data = Commands()


def _run_bundle(station: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> str:
    claims = _claim(station, dispatch_id, job_ids)
    if not claims:
        return "nothing to do"
    supervisor = Supervisor(station, claims)
    supervisor.run()
    if supervisor.failed:
        raise BundleFailed(", ".join(format_job_id(job_id) for job_id in supervisor.failed))
    return "recorded"


def _claim(station: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> list[Claim]:
    """Claim what the message names, waiting for a database that does not answer."""
    while not station.stopping.is_set() and station.leaving.why is None:
        try:
            # What could not be recorded yet may end the very jobs that are about to be claimed.
            station.recorder.replay()
            return _claim_now(station, dispatch_id, job_ids)
        except WrongDatabase as error:
            station.leaving.because(error)
        except DatabaseUnreachable as error:
            log.warning("%s; waiting for it", error)
            station.stopping.wait(_DATABASE_WAIT_S)
    if station.leaving.why is not None:
        _give_back(station, dispatch_id)
    return []


def _claim_now(station: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> list[Claim]:
    try:
        with station.database.write() as session:
            station.database.require_own(session)
            if not are_of_one_model(session, job_ids):
                log.error("message %s refused: it names jobs of several models", dispatch_id)
                return []
            claims = jobs.claim(session, job_ids, station.worker_id, station.settings.lease_s)
            # The message is spent: what it named and we may not have is for the next one.
            window.take_out(session, [dispatch_id])
        return claims
    except DatabaseRefused as error:
        found = explain(station.database, error)
        if found is error:
            # These jobs' fault or ours: whoever waited here would take no other message.
            log.exception("message %s names what cannot be claimed", dispatch_id)
            return []
        raise found from error


def _give_back(station: WorkerContext, dispatch_id: str) -> None:
    """Have the jobs of a message that nobody will act on sent again at once, where the database takes it."""
    try:
        with station.database.write() as session:
            station.database.require_same(session)
            window.take_out(session, [dispatch_id])
    except DatabaseUnreachable as error:
        log.warning("%s; message %s is sent again once it is missed", error, dispatch_id)

"""The Celery task: claim jobs, and supervise the runner that does them."""

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
from qbatch.worker.serving.cards import write_cards
from qbatch.worker.serving.message_check import Commands
from qbatch.worker.serving.supervisor import Supervisor, WorkerContext

log = logging.getLogger("qbatch.worker")

_DATABASE_WAIT_S = 3.0
_CONSUMER = "qbatch.worker.serving.message_check:Consumer"


class BundleFailed(Exception):
    """A job of the bundle failed. That is already recorded; this makes Celery and Flower show a failure too."""


def register(app: Celery, context: WorkerContext) -> None:
    """Make ``app`` run bundles in ``context``. Messages that ask for anything else are refused."""

    @app.task(name=RUN_BUNDLE, bind=True, throws=(BundleFailed,))  # type: ignore[untyped-decorator]
    def run_bundle(task: Any, job_ids: list[int]) -> str:
        return _run_bundle(context, task.request.id, job_ids)

    app.conf.worker_consumer = _CONSUMER
    app.finalize()
    # Celery registers tasks of its own, which can run other tasks.
    for name in app.tasks.keys() - {RUN_BUNDLE}:
        app.tasks.unregister(name)
    control.Panel.data = Commands()


def _run_bundle(context: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> str:
    claims = _claim(context, dispatch_id, job_ids)
    if not claims:
        return "nothing to do"
    supervisor = Supervisor(context, claims)
    supervisor.run()
    write_cards(context.database, context.settings, context.recorder.take_recorded())
    if not context.stopping.is_set() and context.shutdown.reason is None:
        context.runners.stand_by()
    if supervisor.failed:
        raise BundleFailed(", ".join(format_job_id(job_id) for job_id in supervisor.failed))
    return "recorded"


def _claim(context: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> list[Claim]:
    """Claim the jobs of a message. Waits while the database does not answer."""
    while not context.stopping.is_set() and context.shutdown.reason is None:
        try:
            # Outcomes that could not be recorded yet may belong to the jobs that are about to be claimed.
            context.recorder.replay()
            return _claim_now(context, dispatch_id, job_ids)
        except WrongDatabase as error:
            context.shutdown.request(error)
        except DatabaseUnreachable as error:
            log.warning("%s; waiting for it", error)
            context.stopping.wait(_DATABASE_WAIT_S)
    if context.shutdown.reason is not None:
        _return_message(context, dispatch_id)
    return []


def _claim_now(context: WorkerContext, dispatch_id: str, job_ids: Sequence[int]) -> list[Claim]:
    try:
        with context.database.write() as session:
            context.database.require_own(session)
            if not are_of_one_model(session, job_ids):
                log.error("message %s refused: its jobs belong to different models", dispatch_id)
                return []
            claims = jobs.claim(session, job_ids, context.worker_id, context.settings.lease_s)
            # The message has been read; jobs that could not be claimed will be sent in another one.
            window.take_out(session, [dispatch_id])
        return claims
    except DatabaseRefused as error:
        cause = explain(context.database, error)
        if cause is error:
            # The fault is with these jobs or with our code. Waiting would keep this worker from all other messages.
            log.exception("the jobs of message %s cannot be claimed", dispatch_id)
            return []
        raise cause from error


def _return_message(context: WorkerContext, dispatch_id: str) -> None:
    """Let the scheduler send the jobs of a message again at once, if the database permits."""
    try:
        with context.database.write() as session:
            context.database.require_same(session)
            window.take_out(session, [dispatch_id])
    except DatabaseUnreachable as error:
        log.warning("%s; message %s will be sent again when the scheduler misses it", error, dispatch_id)

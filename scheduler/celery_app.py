"""The Celery application, with a reason for each setting."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from qbatch.core.settings import Settings
from qbatch.scheduler.queues import PRIORITY_STEPS

# Celery prefers these variables to its configuration. Set for another application, they would send qbatch's messages to
# a broker that its workers do not read, and others may.
_CELERY_VARIABLES = (
    *("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"),
    *("CELERY_RESULT_BACKEND", "CELERY_LOADER"),
)


def make_app(settings: Settings) -> Celery:
    """A Celery application that uses the broker of ``settings``. It does not connect yet."""
    for name in _CELERY_VARIABLES:
        os.environ.pop(name, None)
    app = Celery("qbatch", broker=settings.celery_broker_url, set_as_current=False)
    app.conf.update(_configuration(settings))
    return app


def _configuration(settings: Settings) -> dict[str, Any]:
    return {
        # Messages carry only ids, so they need nothing beyond JSON, and JSON cannot carry code.
        "task_serializer": "json",
        "accept_content": ["json"],
        # Results are stored in the database.
        "task_ignore_result": True,
        # A message has done its work once it is read: from the claim on, the database keeps track of the job. With late
        # acknowledgement, it would be delivered again during every job longer than the visibility timeout.
        "task_acks_late": False,
        # Take one bundle at a time, and reserve none that another worker could start.
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # A short interruption of Redis must not kill hours of work; the database prevents double results.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            # Only a message whose worker died between receiving and acknowledging it waits this long.
            "visibility_timeout": max(int(settings.lease_s), 1),
            "priority_steps": PRIORITY_STEPS,
            "queue_order_strategy": "priority",
            "socket_connect_timeout": 5,
            # If the network drops packets silently, a command, and with it the consumer, would hang for ever.
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        # Sending must fail quickly, so that `submit` can report that the scheduler will send the job instead.
        "task_publish_retry": False,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "enable_utc": True,
    }

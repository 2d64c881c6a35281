"""The Celery application, each setting with its reason."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from qbatch.core.settings import Settings
from qbatch.scheduler.queues import PRIORITY_STEPS

# Celery takes these before what it is told, whoever's they are: the messages would go where no worker of ours looks, or
# where strangers do.
_OTHERS = (
    *("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"),
    *("CELERY_RESULT_BACKEND", "CELERY_LOADER"),
)


def make_app(settings: Settings) -> Celery:
    """A Celery application on the broker of ``settings``. Connects to nothing yet."""
    for name in _OTHERS:
        os.environ.pop(name, None)
    app = Celery("qbatch", broker=settings.celery_broker_url, set_as_current=False)
    app.conf.update(_configuration(settings))
    return app


def _configuration(settings: Settings) -> dict[str, Any]:
    return {
        # Messages are ids: nothing that needs, or could smuggle, more than JSON.
        "task_serializer": "json",
        "accept_content": ["json"],
        # Results live in the database.
        "task_ignore_result": True,
        # A message is a hint that is spent once it is read: the database holds the job from its claim on. Acknowledged
        # late, it would be delivered again under every job longer than the visibility timeout.
        "task_acks_late": False,
        # One bundle at a time, and none set aside that another worker could have begun.
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        # A Redis blip must not kill hours of work; the database fences.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            # Only a message that died between its pop and its acknowledgement waits this long.
            "visibility_timeout": max(int(settings.lease_s), 1),
            "priority_steps": PRIORITY_STEPS,
            "queue_order_strategy": "priority",
            "socket_connect_timeout": 5,
            # A network that goes silent without a word would hold a command, and with it the consumer, for ever.
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        # Sending must fail soon, so that submit can say that the scheduler will do it.
        "task_publish_retry": False,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "enable_utc": True,
    }

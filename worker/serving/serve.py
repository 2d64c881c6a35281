"""Start the worker of one device: while its forkserver imports what runners need, it imports Celery."""

from __future__ import annotations

import os
import sys

from qbatch.core.domain import DeviceKind
from qbatch.core.errors import QbatchError, UsageError
from qbatch.core.settings import Settings
from qbatch.worker.machine.logs import log_to_stderr
from qbatch.worker.serving.environment import has_database_password, without_secrets
from qbatch.worker.serving.runner_forkserver import begin_imports
from qbatch.worker.serving.usable_folders import check_environment


def main(uuid: str | None, *, drain: bool) -> int:
    """Serve the GPU with that UUID, or the CPU, until told to stop. Returns the exit code."""
    log_to_stderr()
    try:
        settings = Settings.from_env(os.environ)
        check_environment(settings)
        drop_secrets(settings)
        forkserver = begin_imports(settings, DeviceKind.CPU if uuid is None else DeviceKind.CUDA)
        # This import takes a second, and the forkserver's take longer.
        from qbatch.worker.serving.celery_worker import CeleryWorker

        return CeleryWorker(settings, uuid, forkserver, drain=drain).run()
    except QbatchError as error:
        print(f"qbatch worker: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


def drop_secrets(settings: Settings) -> None:
    """Remove secrets from the environment, which every forkserver inherits. From here on only ``settings`` has them.

    Raises UsageError if the password of the database is one of them.
    """
    if has_database_password(os.environ) and not settings.sqlalchemy_url.startswith("sqlite"):
        raise UsageError(
            "PGPASSWORD is set, and runners would inherit it: unset it and put the password into QBATCH_DATABASE_URL"
        )
    kept = without_secrets(os.environ)
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]

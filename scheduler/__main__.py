"""``python -P -m scheduler``: run the scheduler until SIGTERM."""

from __future__ import annotations

import logging
import os
import sys

from models_db.errors import DatabaseUnreachable, QbatchError
from models_db.schema import ensure
from models_db.session import Database
from models_db.settings import Settings
from scheduler.broker import Broker
from scheduler.loop import Scheduler
from scheduler.process import hide_from_equals
from scheduler.stop import Stop

log = logging.getLogger("qbatch.scheduler")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    hide_from_equals()
    stop = Stop()
    stop.heed_signals()
    try:
        settings = Settings.from_env(os.environ)
        # Frozen, or with its host gone, it must not keep the lead locked.
        database = Database(settings.sqlalchemy_url, frozen_s=settings.lease_s)
        wait_for_schema(database, stop)
        Scheduler(database, Broker(settings), settings).run(stop)
    except QbatchError as error:
        print(f"qbatch scheduler: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def wait_for_schema(database: Database, stop: Stop) -> None:
    """Until the database answers with this version's schema, or ``stop`` is set."""
    while not stop.is_set():
        try:
            ensure(database)
            return
        except DatabaseUnreachable as error:
            log.warning("%s; waiting for it", error)
            stop.wait(5.0)


if __name__ == "__main__":
    sys.exit(main())

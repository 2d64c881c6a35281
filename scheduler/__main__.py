"""``python -P -m qbatch.scheduler``: run the scheduler until SIGTERM."""

from __future__ import annotations

import logging
import os
import sys

from qbatch.core.errors import DatabaseUnreachable, QbatchError, WrongDatabase
from qbatch.core.settings import Settings
from qbatch.models_db.network_share import share_of
from qbatch.models_db.schema import ensure
from qbatch.models_db.session import Database
from qbatch.scheduler.broker import Broker
from qbatch.scheduler.child_process import hide_from_equals
from qbatch.scheduler.loop import Scheduler
from qbatch.scheduler.stop import Stop

log = logging.getLogger("qbatch.scheduler")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    hide_from_equals()
    stop = Stop()
    stop.set_on_signals()
    try:
        settings = Settings.from_env(os.environ)
        # If this process freezes or its host fails, its locks on the database must be released.
        database = Database(settings.sqlalchemy_url, frozen_s=settings.lease_s)
        hold_share(database, settings)
        wait_for_schema(database, stop)
        Scheduler(database, Broker(settings), settings).run(stop)
    except QbatchError as error:
        print(f"qbatch scheduler: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def hold_share(database: Database, settings: Settings) -> None:
    """Warn of SQLite on a network file system. Raises DatabaseOfAnotherHost while another host uses it."""
    share = share_of(database.file)
    if share is not None:
        log.warning("%s", share.warning)
        share.hold(settings.lease_s)


def wait_for_schema(database: Database, stop: Stop) -> None:
    """Wait until the database answers and has this version's schema, or ``stop`` is set.

    Raises WrongDatabase if waiting cannot help.
    """
    while not stop.is_set():
        try:
            ensure(database)
            return
        except WrongDatabase:
            raise
        except DatabaseUnreachable as error:
            log.warning("%s; trying again in 5 s", error)
            stop.wait(5.0)


if __name__ == "__main__":
    sys.exit(main())

"""What all commands need: the settings and the database."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database


INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells know it."""


def current_settings() -> Settings:
    """The settings in this process's environment. Raises UsageError."""
    return Settings.from_env(os.environ)


def open_database(settings: Settings) -> Database:
    """Connect to the database and require this version's schema. An SQLite file is created or upgraded if necessary."""
    database = connect(settings)
    if database.is_sqlite and database.is_behind():
        from qbatch.models_db.schema import upgrade as upgrade_schema

        upgrade_schema(database)
    database.require_schema()
    return database


def connect(settings: Settings) -> Database:
    """Connect to the database without checking its schema.

    Raises DatabaseOfAnotherHost for an SQLite file that another host is using.
    """
    from qbatch.models_db.network_share import share_of
    from qbatch.models_db.session import Database

    # A command that somebody stops (Ctrl-Z) within a transaction must not hold for ever what it has locked.
    database = Database(settings.sqlalchemy_url, frozen_s=settings.lease_s)
    share = share_of(database.file)
    if share is not None:
        share.check(settings.lease_s)
    return database

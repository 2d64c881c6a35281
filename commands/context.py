"""What all commands need: the settings, the database, and ids checked against it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qbatch.core.domain import format_batch_id, format_job_id, parse_id
from qbatch.core.errors import UsageError
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.models_db.session import Database


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

    database = Database(settings.sqlalchemy_url)
    share = share_of(database.file)
    if share is not None:
        share.check(settings.lease_s)
    return database


def parse_batch_ids(texts: Sequence[str]) -> list[int]:
    """The numbers of batch ids such as b12. Raises UsageError."""
    return _numbers(texts, "b", "{} is a job id; this command takes batch ids such as b12")


def parse_job_ids(texts: Sequence[str]) -> list[int]:
    """The numbers of job ids such as j345. Raises UsageError."""
    return _numbers(texts, "j", "{} is a batch id; this command takes job ids such as j345")


def _numbers(texts: Sequence[str], wanted: str, refusal: str) -> list[int]:
    parsed = [parse_id(text) for text in texts]
    for text, (kind, _) in zip(texts, parsed, strict=True):
        if kind != wanted:
            raise UsageError(refusal.format(text))
    return [number for _, number in parsed]


def require_batches(database: Database, batch_ids: Sequence[int]) -> None:
    """Raise UsageError if one of the batches does not exist."""
    from qbatch.models_db.batches import batch_exists

    with database.read() as session:
        for batch_id in batch_ids:
            if not batch_exists(session, batch_id):
                raise UsageError(f"no such batch: {format_batch_id(batch_id)}")


def require_jobs(database: Database, job_ids: Sequence[int]) -> None:
    """Raise UsageError if one of the jobs does not exist."""
    from qbatch.models_db.batches import job_exists

    with database.read() as session:
        for job_id in job_ids:
            if not job_exists(session, job_id):
                raise UsageError(f"no such job: {format_job_id(job_id)}")

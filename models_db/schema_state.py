"""Which migrations have run on a database, and which code works with it. Every version reads this: do not change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sqlalchemy import Connection, inspect, text


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaState:
    """``version`` is the newest migration that has run, None for an empty database.

    ``oldest_code`` maps each migration to the oldest schema whose code works with its result; the migrations themselves
    store it.
    """

    version: str | None
    oldest_code: dict[str, str]

    @classmethod
    def read(cls, connection: Connection) -> Self:
        """Read the state of any database, even an empty one or that of another program."""
        tables = inspect(connection)
        if not tables.has_table("alembic_version"):
            return cls(version=None, oldest_code={})
        return cls(
            version=read_version(connection),
            oldest_code=_read_oldest_code(connection) if tables.has_table("schema_versions") else {},
        )

    def is_newer_than(self, head: str) -> bool:
        """Whether migrations newer than ``head`` have run."""
        # All have four digits, so the order of texts is that of numbers.
        return self.version is not None and self.version > head

    def works_with(self, head: str) -> bool:
        """Whether code whose newest migration is ``head`` works with this schema, according to the later migrations."""
        if self.version == head:
            return True
        newer = {version: oldest for version, oldest in self.oldest_code.items() if version > head}
        return self.version in newer and max(newer.values()) <= head


def read_version(connection: Connection) -> str | None:
    """The newest migration that has run. Cheap enough for every claim. Fails if there is no ``alembic_version``."""
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def _read_oldest_code(connection: Connection) -> dict[str, str]:
    rows = connection.execute(text("SELECT version, oldest_code FROM schema_versions"))
    return {row.version: row.oldest_code for row in rows}

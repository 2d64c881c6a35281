"""Which schema a database stands at, and which code works with it. Read by every version, so it must not change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sqlalchemy import Connection, inspect, text


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaState:
    """``version``: the newest migration, None for an empty database. ``oldest_code``: by migration, the oldest schema
    whose code works with what it left; the migrations themselves write it down."""

    version: str | None
    oldest_code: dict[str, str]

    @classmethod
    def read(cls, connection: Connection) -> Self:
        """Of any database, be it empty or another program's."""
        tables = inspect(connection)
        if not tables.has_table("alembic_version"):
            return cls(version=None, oldest_code={})
        return cls(
            version=read_version(connection),
            oldest_code=_read_oldest_code(connection) if tables.has_table("schema_versions") else {},
        )

    def is_newer_than(self, head: str) -> bool:
        """Whether a newer version's migrations have run than the one whose newest is ``head``."""
        # Four digits each, so that the order of the texts is that of the numbers.
        return self.version is not None and self.version > head

    def works_with(self, head: str) -> bool:
        """Whether code whose newest migration is ``head`` works with it, as far as the migrations since then say."""
        if self.version == head:
            return True
        newer = {version: oldest for version, oldest in self.oldest_code.items() if version > head}
        return self.version in newer and max(newer.values()) <= head


def read_version(connection: Connection) -> str | None:
    """Cheap enough for every claim. Fails where there is no such table."""
    version: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return version


def _read_oldest_code(connection: Connection) -> dict[str, str]:
    rows = connection.execute(text("SELECT version, oldest_code FROM schema_versions"))
    return {row.version: row.oldest_code for row in rows}

"""What SQLite knows of the sizes of its tables when it plans a query. PostgreSQL gathers the same by itself."""

from __future__ import annotations

from sqlalchemy import text

from qbatch.models_db.session import Database

# Entries that are read of each index: enough to tell a selective one from another, in milliseconds.
_SAMPLE = 1000


def refresh_statistics(database: Database) -> None:
    """Gather the statistics again on SQLite, which does not do so by itself. Raises DatabaseUnreachable."""
    if not database.is_sqlite:
        return
    with database.write() as session:
        session.execute(text(f"PRAGMA analysis_limit={_SAMPLE}"))
        session.execute(text("ANALYZE"))

"""Compare the tables of a database with this version's schema, to explain why the database refused a statement."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.engine.interfaces import ReflectedColumn

from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, ForeignSchema
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Base


def explain(database: Database, refusal: DatabaseRefused) -> DatabaseUnreachable:
    """The cause of a refusal.

    WrongDatabase if the schema has changed or the database was replaced, DatabaseUnreachable if it does not answer any
    more, or else ``refusal`` itself: then the statement was at fault.
    """
    try:
        with database.read() as session:
            database.require_own(session)
            problem = misfit(session.connection())
    except DatabaseRefused:
        return refusal
    except DatabaseUnreachable as error:
        return error
    if problem is None:
        return refusal
    return ForeignSchema(
        f"the schema of the database {database.place} was changed: {problem}: update qbatch here, or undo the change"
    )


def misfit(connection: Connection) -> str | None:
    """The first missing column, or the first unknown column that requires a value; None if there is neither."""
    inspector = inspect(connection)
    for table in Base.metadata.sorted_tables:
        if inspector.has_table(table.name):
            problem = _misfit_of(table, inspector.get_columns(table.name))
            if problem is not None:
                return problem
    return None


def _misfit_of(table: Table, found: list[ReflectedColumn]) -> str | None:
    names = {column["name"] for column in found}
    for known in table.columns:
        if known.name not in names:
            return f"the table {table.name} no longer has the column {known.name}"
    for column in found:
        ours = table.columns.get(column["name"])
        if _must_be_filled(column) and (ours is None or ours.nullable):
            return f"the table {table.name} requires a value for {column['name']}, which this version does not know"
    return None


def _must_be_filled(column: ReflectedColumn) -> bool:
    makes_its_own = column.get("default") is not None or "computed" in column or "identity" in column
    return not column["nullable"] and not makes_its_own

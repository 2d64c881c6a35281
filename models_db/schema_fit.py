"""Whether this version's code fits a database, told from its tables: asked when the database refused something."""

from __future__ import annotations

from sqlalchemy import Connection, Table, inspect
from sqlalchemy.engine.interfaces import ReflectedColumn

from qbatch.core.errors import DatabaseRefused, DatabaseUnreachable, ForeignSchema
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Base


def explain(database: Database, refusal: DatabaseRefused) -> DatabaseUnreachable:
    """What stands behind a refusal: the schema is no longer this version's (WrongDatabase), the database has gone
    meanwhile (DatabaseUnreachable), or what was asked for was at fault: ``refusal`` itself."""
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
    return ForeignSchema(f"the database {database.place} was changed: {problem}: update qbatch here, or undo it")


def misfit(connection: Connection) -> str | None:
    """The first column that this version's code misses, or would have to fill and does not know."""
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
            return f"{table.name} has no column {known.name} any more"
    for column in found:
        ours = table.columns.get(column["name"])
        if _must_be_filled(column) and (ours is None or ours.nullable):
            return f"{table.name} wants a value for {column['name']}, which this version does not give"
    return None


def _must_be_filled(column: ReflectedColumn) -> bool:
    makes_its_own = column.get("default") is not None or "computed" in column or "identity" in column
    return not column["nullable"] and not makes_its_own

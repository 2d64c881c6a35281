"""Alembic's environment: run the migrations on the connection that ``upgrade`` passes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.runtime.migration import MigrationContext, MigrationInfo

from qbatch.models_db.tables import Base

connection = context.config.attributes["connection"]


def note_oldest_code(
    ctx: MigrationContext,
    step: MigrationInfo,
    heads: Collection[Any],  # noqa: ARG001
    run_args: Mapping[str, Any],  # noqa: ARG001
) -> None:
    """Store the ``oldest_code`` of a migration: the oldest schema whose code works with its result."""
    if ctx.connection is None or not sa.inspect(ctx.connection).has_table("schema_versions"):
        return
    versions = sa.table("schema_versions", sa.column("version"), sa.column("oldest_code"))
    ctx.connection.execute(versions.delete().where(versions.c.version == step.up_revision_id))
    if step.is_upgrade:
        oldest_code = step.up_revision.module.oldest_code  # type: ignore[union-attr]
        ctx.connection.execute(versions.insert().values(version=step.up_revision_id, oldest_code=oldest_code))


context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite can alter a table only by copying it.
    render_as_batch=connection.dialect.name == "sqlite",
    transaction_per_migration=False,
    on_version_apply=note_oldest_code,
)
IS_SQLITE = connection.dialect.name == "sqlite"
if IS_SQLITE:
    # A table that is copied is away for a moment, and so is what the view `result_rows` reads: do not check it then.
    connection.exec_driver_sql("PRAGMA legacy_alter_table=ON")
try:
    context.run_migrations()
finally:
    if IS_SQLITE:
        connection.exec_driver_sql("PRAGMA legacy_alter_table=OFF")

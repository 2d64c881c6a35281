"""How Alembic runs the migrations: on the connection that ``upgrade`` hands over."""

from __future__ import annotations

from alembic import context

from models_db.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite alters a table only by copying it.
    render_as_batch=connection.dialect.name == "sqlite",
    transaction_per_migration=False,
)
context.run_migrations()

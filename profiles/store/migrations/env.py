"""Alembic runs this file; the connection, already in a transaction, comes from `engine.py`."""

from __future__ import annotations

from alembic import context

from attnplan.profiles.store.migrations.engine import VERSION_TABLE
from attnplan.profiles.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    # Optuna keeps its own tables in the same database.
    include_name=lambda name, kind, _parents: kind != "table" or name in Base.metadata.tables,
    render_as_batch=True,
)
context.run_migrations()

"""Alembic's environment: runs the migrations on the connection it is handed, inside that connection's transaction.

Whoever calls it owns transaction, backup and commit; so a migration is applied as a whole or not at all.
"""

from __future__ import annotations

from alembic import context

from schema.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()

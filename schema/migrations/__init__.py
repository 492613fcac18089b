"""Alembic's migrations of `schema.tables`; sllmctl.state runs them when it opens a database."""

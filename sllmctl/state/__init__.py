"""What must survive a restart, in SQLite: the only package that speaks SQL."""

from __future__ import annotations

from sllmctl.state.database import Cluster, Database

__all__ = ["Cluster", "Database"]

"""How SQLite is opened: one writer that begins IMMEDIATE, readers that only read, and what its errors mean.

A deferred transaction that reads and then writes fails at once when another wrote between, whatever busy_timeout says, or
loses updates when the driver hides its BEGIN; so the driver's own transactions are off and the writer begins IMMEDIATE.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from schema.errors import Conflict, InvalidInput, OutOfSpace, SllmError

__all__ = ["database_path", "error_of", "read_engine", "write_engine"]

_BUSY_TIMEOUT_MS = 10_000
"""How long a connection waits for a lock of another process, such as a backup; two managers are kept apart by a lock file."""


def database_path(url: str) -> tuple[URL, Path]:
    """The parsed URL and the file it names. Raises InvalidInput for what is not a SQLite file."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidInput(f"database URL {url!r} is not readable: {error}", "database_url") from error
    if parsed.drivername not in ("sqlite", "sqlite+aiosqlite") or parsed.database in (None, "", ":memory:"):
        raise InvalidInput(f"database URL {url!r} is not a SQLite file; use sqlite+aiosqlite:////path", "database_url")
    assert parsed.database is not None
    return parsed.set(drivername="sqlite+aiosqlite"), Path(parsed.database)


def write_engine(url: URL, *, foreign_keys: bool = True) -> AsyncEngine:
    """One connection, BEGIN IMMEDIATE, WAL, synchronous FULL. A migration that rebuilds tables goes without foreign keys."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0)
    _prepare(engine, "PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", f"PRAGMA foreign_keys={int(foreign_keys)}")
    _begin(engine, "BEGIN IMMEDIATE")
    return engine


def read_engine(url: URL) -> AsyncEngine:
    """Connections that see one committed state per transaction and can write nothing."""
    engine = create_async_engine(url, pool_size=2, max_overflow=2)
    _prepare(engine, "PRAGMA query_only=1")
    _begin(engine, "BEGIN")
    return engine


def _prepare(engine: AsyncEngine, *pragmas: str) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}", *pragmas):
            cursor.execute(pragma)
        cursor.close()


def _begin(engine: AsyncEngine, statement: str) -> None:
    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)


def error_of(error: DBAPIError | sqlite3.Error | OSError, path: Path) -> SllmError:
    """What a driver's error means for the operator."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = getattr(cause, "sqlite_errorname", "")
    text = str(cause)
    if name.startswith("SQLITE_FULL") or "disk is full" in text or getattr(cause, "errno", 0) == errno.ENOSPC:
        return OutOfSpace(
            f"the disk that holds the database {path} is full; nothing of this change was kept; make room there, and start the "
            "manager if it has ended"
        )
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")) or "malformed" in text or "not a database" in text:
        return InvalidInput(f"the database {path} is damaged or not a SQLite file ({text}); restore a backup", "database_url")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Conflict(f"the database {path} is locked by another process: {text}")
    return SllmError(f"the database {path} failed: {text}")

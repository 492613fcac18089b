"""Bring a database to this build's schema: refuse a newer one, back up an older one, migrate in one transaction."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.engine import URL

import schema.migrations
from schema.errors import Conflict, SllmError
from sllmctl.state.engines import write_engine

__all__ = ["migrate", "revisions"]


async def migrate(url: URL, path: Path, backup_dir: Path) -> Path | None:
    """Migrate the file at ``path``; the backup that was made first, or None when there was nothing to keep.

    Raises Conflict for a newer schema, naming both revisions, and for a database of something else.
    """
    config = _config()
    head, known = revisions()
    backup: Path | None = None
    engine = write_engine(url, foreign_keys=False)
    try:
        async with engine.begin() as connection:
            revision, tables = await connection.run_sync(_revision)
        if revision == head:
            return None
        if revision is not None and revision not in known:
            raise Conflict(
                f"the database {path} has schema revision {revision}, which this build (revision {head}) does not know; "
                "run the newer sllmctl, or restore a backup of the older one"
            )
        if revision is None and tables:
            raise Conflict(f"the database {path} holds tables of something else; name another file in database_url")
        if revision is not None:
            backup = await asyncio.to_thread(_back_up, path, backup_dir, revision)
        async with engine.begin() as connection:
            await connection.run_sync(_upgrade, config)
    finally:
        await engine.dispose()
    return backup


def revisions() -> tuple[str | None, set[str]]:
    """This build's newest schema revision, and all that it knows."""
    scripts = ScriptDirectory.from_config(_config())
    return scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.migrations.__file__).parent).replace("%", "%%"))
    return config


def _revision(connection: Connection) -> tuple[str | None, bool]:
    """The file's revision, and whether it has tables; damage is found here rather than in the middle of the work."""
    damage = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if damage != "ok":
        raise sqlite3.DatabaseError(f"malformed: {damage}")
    if (broken := _broken_reference(connection)) is not None:
        raise sqlite3.DatabaseError(f"malformed: {broken}")
    tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master WHERE type = 'table'").scalar_one()
    return MigrationContext.configure(connection).get_current_revision(), bool(tables)


def _upgrade(connection: Connection, config: Config) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if (broken := _broken_reference(connection)) is not None:
        raise SllmError(f"the migration would leave {broken}; nothing was changed")


def _broken_reference(connection: Connection) -> str | None:
    found = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    return None if found is None else f"{found[0]} row {found[1]} pointing nowhere"


def _back_up(path: Path, backup_dir: Path, revision: str) -> Path:
    """A consistent copy of the file, durable before the migration begins."""
    backup_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = backup_dir / f"{path.stem}-{revision}-{stamp}.db"
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    source, copy = sqlite3.connect(path), sqlite3.connect(target)
    try:
        source.backup(copy)
    except sqlite3.Error:
        target.unlink()  # a manager that is started again and again would leave one each time
        raise
    finally:
        copy.close()
        source.close()
    for place in (target, backup_dir):
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return target

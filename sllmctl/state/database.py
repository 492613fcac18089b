"""The manager's database: opened and migrated once, written through one door, read beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from sqlalchemy import ColumnClause, Connection, Integer, and_, delete, insert, literal_column, or_, select, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from schema.admin import EventView, OutcomeView
from schema.errors import Conflict, InvalidInput
from schema.tables import Base, ClusterRow, EventRow, OutcomeRow
from sllmctl.cluster.changes import PutEstimate, RowChange
from sllmctl.cluster.view import ClusterView
from sllmctl.state.engines import database_path, error_of, read_engine, write_engine
from sllmctl.state.migrate import migrate
from sllmctl.state.rows import apply, read_estimates, read_view

__all__ = ["Cluster", "Database"]

T = TypeVar("T")

_rowid: ColumnClause[int] = literal_column("rowid", Integer)
"""The order in which rows were written; the ids of events are only as fine as a millisecond."""


@dataclass(slots=True)
class _Log:
    """A table that is only appended to, and cut now and then to its newest ``keep`` rows."""

    kind: type
    row: type[Base]
    keep: int
    untrimmed: int


class Cluster(msgspec.Struct, frozen=True):
    """Who this cluster is, and the generation of the manager that has claimed it."""

    uuid: str
    generation: int


class Database:
    """The open database of one manager; made by `open`, ended by `close`."""

    def __init__(self, path: Path, writer: AsyncEngine, reader: AsyncEngine, lock: int, logs: tuple[_Log, ...]) -> None:
        self.path = path
        self.backup: Path | None = None
        self._writer = writer
        self._reader = reader
        self._lock = lock
        self._logs = logs

    @classmethod
    async def open(
        cls, url: str, *, backup_dir: str | Path, events_keep: int = 10_000, outcomes_keep: int = 10_000
    ) -> Database:
        """Take the database for this process, back it up if its schema is older, and migrate it.

        ``backup`` names the backup that was made. Raises Conflict when another manager holds it, or for a newer schema;
        InvalidInput for a damaged file or a wrong URL; OutOfSpace when the disk is full.
        """
        parsed, path = database_path(url)
        lock = _take(path)
        logs = (
            _Log(EventView, EventRow, events_keep, events_keep),
            _Log(OutcomeView, OutcomeRow, outcomes_keep, outcomes_keep),
        )
        try:
            return await cls._open(parsed, path, Path(backup_dir), lock, logs)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    async def _open(cls, url: URL, path: Path, backup_dir: Path, lock: int, logs: tuple[_Log, ...]) -> Database:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise error_of(error, path) from error
            raise InvalidInput(f"cannot open the database {path}: {error.strerror}", "database_url") from error
        try:
            backup = await migrate(url, path, backup_dir)
        except (DBAPIError, sqlite3.Error, OSError) as error:
            raise error_of(error, path) from error
        database = cls(path, write_engine(url), read_engine(url), lock, logs)
        database.backup = backup
        return database

    async def claim(self, now: float, uuid: str) -> Cluster:
        """Begin a new manager generation, durably; ``uuid`` names a cluster that is new. Before anything else is done."""
        return await self._write(lambda connection: _claim(connection, now, uuid))

    async def load(self) -> ClusterView:
        """The cluster as it was last committed; nothing live is known yet."""
        return await self._read(read_view)

    async def commit(self, changes: Sequence[RowChange]) -> None:
        """Write all changes, in order, in one transaction; durable on return. Raises OutOfSpace, Conflict or SllmError,
        and then none of them is kept."""
        if not changes:
            return
        kinds = Counter(type(change) for change in changes)
        for log in self._logs:
            log.untrimmed += kinds[log.kind]
        full = [log for log in self._logs if log.untrimmed > log.keep // 10]

        def write(connection: Connection) -> None:
            apply(connection, changes)
            for log in full:
                oldest = select(_rowid).select_from(log.row).order_by(_rowid.desc()).offset(log.keep).limit(1)
                connection.execute(delete(log.row).where(_rowid <= oldest.scalar_subquery()))

        await self._write(write)
        for log in full:
            log.untrimmed = 0

    async def estimates(self) -> list[PutEstimate]:
        """The coefficients that were learned."""
        return await self._read(read_estimates)

    async def outcomes(self, limit: int = 100) -> list[OutcomeView]:
        """The newest estimates with their outcomes, oldest first."""
        query = select(*(column for column in OutcomeRow.__table__.columns if column.name != "id"))
        query = query.order_by(OutcomeRow.id.desc()).limit(limit)

        def read(connection: Connection) -> list[OutcomeView]:
            return [OutcomeView(**row) for row in connection.execute(query).mappings()]

        return (await self._read(read))[::-1]

    async def events(
        self,
        kind: str | None = None,
        object: str | None = None,  # noqa: A002
        limit: int = 100,
        after: str | None = None,
    ) -> list[EventView]:
        """Events, oldest first: the last ``limit`` of them, or the first ``limit`` that follow the event ``after``. Of an
        ``object``, or of the checkpoints whose digests begin so."""
        query = select(*EventRow.__table__.columns)
        if kind is not None:
            query = query.where(EventRow.kind == kind)
        if object is not None:
            digest = and_(EventRow.kind == "checkpoint", EventRow.object.startswith(object, autoescape=True))
            query = query.where(or_(EventRow.object == object, digest))
        if after is not None:
            place = select(_rowid).select_from(EventRow).where(EventRow.id == after).scalar_subquery()
            query = query.where(or_(_rowid > place, place.is_(None) & (EventRow.id > after)))
        query = query.order_by(_rowid.desc() if after is None else _rowid).limit(limit)

        def read(connection: Connection) -> list[EventView]:
            return [EventView(**row) for row in connection.execute(query).mappings()]

        rows = await self._read(read)
        return rows[::-1] if after is None else rows

    async def close(self) -> None:
        """Close every connection and let another manager take the database; once more does nothing."""
        lock, self._lock = self._lock, -1
        if lock < 0:
            return
        try:
            await self._reader.dispose()
            await self._writer.dispose()
        finally:
            os.close(lock)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        try:
            async with self._writer.begin() as connection:
                return await connection.run_sync(work)
        except (DBAPIError, sqlite3.Error) as error:
            raise error_of(error, self.path) from error

    async def _read(self, work: Callable[[Connection], T]) -> T:
        try:
            async with self._reader.begin() as connection:
                return await connection.run_sync(work)
        except (DBAPIError, sqlite3.Error) as error:
            raise error_of(error, self.path) from error


def _claim(connection: Connection, now: float, uuid: str) -> Cluster:
    row = connection.execute(select(ClusterRow.uuid, ClusterRow.generation)).first()
    if row is None:
        connection.execute(insert(ClusterRow).values(id=1, uuid=uuid, generation=1, created_at=now))
        return Cluster(uuid, 1)
    connection.execute(update(ClusterRow).values(generation=row.generation + 1))
    return Cluster(row.uuid, row.generation + 1)


def _take(path: Path) -> int:
    """Lock the database for this process; the descriptor holds the lock, and the kernel gives it back when the process dies."""
    place = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(
            f"cannot make {place}: {error.strerror}; name a writable place in database_url", "database_url"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        raise Conflict(
            f"another manager (pid {holder}) holds the database {path}; stop it, or name another database_url"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise error_of(error, place) from error
    return descriptor

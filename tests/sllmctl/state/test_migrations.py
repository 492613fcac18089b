"""Migrations: what they make is what the tables say, an older file is backed up first, a failure changes nothing."""

from __future__ import annotations

import resource
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from schema.errors import SllmError
from schema.spec import ModelSpec, PathSource
from schema.states import ModelState, Tier, TierState
from schema.tables import Base
from sllmctl.cluster.changes import (
    PutEstimate,
    PutModel,
    PutPin,
    PutPlacement,
    PutPublication,
    RemoveCheckpointRow,
    RemoveInstance,
    RemoveModelRow,
    RemovePin,
    RemovePlacement,
    RemovePublication,
)
from sllmctl.state import Database
from tests.sllmctl.state import rows


async def test_the_migrations_make_the_tables_that_the_code_means(database: Database, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/state.db")
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    engine.dispose()
    plain = create_engine("sqlite://")
    Base.metadata.create_all(plain)
    with engine.connect() as migrated, plain.connect() as made:
        checks = """SELECT name, (length(sql) - length(replace(sql, 'CHECK', ''))) / 5 FROM sqlite_master
            WHERE type = 'table' AND name != 'alembic_version' ORDER BY name"""
        assert migrated.exec_driver_sql(checks).all() == made.exec_driver_sql(checks).all()
    engine.dispose()
    plain.dispose()
    assert differences == []


def _make_first(path: Path) -> None:
    """Make of a file of today one of the first release, 0001: what came since is taken away."""
    connection = sqlite3.connect(path)
    for table in ("estimates", "outcomes", "pins", "publications"):
        connection.execute(f"DROP TABLE {table}")
    connection.execute("ALTER TABLE placements DROP COLUMN used_at")
    connection.execute("ALTER TABLE models DROP COLUMN deploy_next")
    connection.execute("ALTER TABLE checkpoints DROP COLUMN step")
    connection.execute("ALTER TABLE instances RENAME COLUMN working_bytes TO kv_bytes")
    connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.commit()
    connection.close()


async def test_a_file_of_the_first_release_is_backed_up_and_migrated_with_all_that_it_holds(
    database: Database, url: str, tmp_path: Path
) -> None:
    await database.commit(rows.whole())
    await database.close()
    _make_first(tmp_path / "state.db")
    opened = await Database.open(url, backup_dir=tmp_path / "backups")
    backup = opened.backup
    assert backup is not None
    assert (await opened.claim(1.0, "u")).generation == 1
    assert list((await opened.load()).instances) == ["inst_1"]
    assert await opened.estimates() == []
    await opened.commit([PutEstimate("bps/n/disk", (1.0, 2.0), 3.0)])
    await opened.close()
    copy = sqlite3.connect(backup)
    assert copy.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    assert copy.execute("SELECT id FROM instances").fetchone() == ("inst_1",)
    copy.close()


async def test_pins_and_uses_come_back_and_a_file_from_before_them_has_none(
    database: Database, url: str, tmp_path: Path
) -> None:
    key = (rows.DIGEST, "n1", Tier.DISK)
    used = PutPlacement(rows.DIGEST, "n1", Tier.DISK, 0, TierState.RESIDENT, 1 << 40, 77.5)
    await database.commit([*rows.whole(), PutPin(*key, 3.5), used])
    view = await database.load()
    assert view.pins == {key: 3.5}
    assert view.placements[*key, 0].used_at == 77.5
    await database.commit([RemovePin(*key)])
    assert (await database.load()).pins == {}
    await database.close()
    _make_first(tmp_path / "state.db")
    opened = await Database.open(url, backup_dir=tmp_path / "backups")
    view = await opened.load()
    assert (view.pins, view.placements[*key, 0].used_at) == ({}, 0.0)
    await opened.commit([PutPin(*key, 3.5)])
    await opened.commit([RemovePlacement(*key, 0), RemoveInstance("inst_1"), RemoveModelRow("m"), RemoveCheckpointRow(key[0])])
    assert (await opened.load()).pins == {}
    await opened.close()


async def test_publications_come_back_and_go_with_their_checkpoint(database: Database, url: str, tmp_path: Path) -> None:
    one, other = PutPublication(rows.DIGEST, "s3://b/p", "exec1", 3.5), PutPublication(rows.DIGEST, "file:///a", "exec1", 4.5)
    await database.commit([*rows.whole(), one, other, PutPublication(rows.DIGEST, "s3://b/p", "other", 5.5, "gone")])
    view = await database.load()
    assert [(each.url, each.layout, each.doubt) for each in view.publications_of(rows.DIGEST)] == [
        ("file:///a", "exec1", ""),
        ("s3://b/p", "other", "gone"),
    ]
    await database.commit([RemovePublication(rows.DIGEST, "s3://b/p")])
    assert [each.url for each in (await database.load()).publications_of(rows.DIGEST)] == ["file:///a"]
    await database.close()
    _make_first(tmp_path / "state.db")
    opened = await Database.open(url, backup_dir=tmp_path / "backups")
    assert (await opened.load()).publications == {}
    await opened.commit([one])
    placements = [RemovePlacement(*key) for key in (await opened.load()).placements]
    await opened.commit([*placements, RemoveInstance("inst_1"), RemoveModelRow("m"), RemoveCheckpointRow(rows.DIGEST)])
    assert (await opened.load()).publications == {}
    await opened.close()


async def test_a_backup_that_has_no_room_leaves_no_part_of_itself(database: Database, url: str, tmp_path: Path) -> None:
    await database.commit([rows.event(number) for number in range(2000)])
    await database.close()
    _make_first(tmp_path / "state.db")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    try:
        with pytest.raises(SllmError):
            await Database.open(url, backup_dir=tmp_path / "backups")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "backups").iterdir()) == []
    opened = await Database.open(url, backup_dir=tmp_path / "backups")
    assert len(await opened.events(limit=5000)) == 2000
    await opened.close()


async def test_a_failing_migration_changes_nothing(
    database: Database, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database.commit(rows.whole())
    await database.close()
    _make_first(tmp_path / "state.db")

    def upgrade(config: object, target: str) -> None:
        connection = config.attributes["connection"]  # type: ignore[attr-defined]
        connection.exec_driver_sql("DROP TABLE events")
        connection.exec_driver_sql("DELETE FROM models")

    monkeypatch.setattr(command, "upgrade", upgrade)
    with pytest.raises(SllmError, match="pointing nowhere"):
        await Database.open(url, backup_dir=tmp_path / "backups")
    connection = sqlite3.connect(tmp_path / "state.db")
    assert connection.execute("SELECT count(*) FROM models").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM events").fetchone() == (0,)
    connection.close()


async def test_what_is_to_be_served_next_comes_back(database: Database) -> None:
    spec = ModelSpec(name="next", source=PathSource("/m"))
    await database.commit([PutModel(spec, ModelState.STOPPED, None, None, None, None, 1.0, 2.0, deploy_next=True)])
    assert (await database.load()).models["next"].deploy_next

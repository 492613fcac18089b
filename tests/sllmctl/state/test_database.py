"""The database through its own door: what is committed is there, whole, and nobody else writes beside us."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest
from sqlalchemy import select, update

from schema.admin import OutcomeView
from schema.errors import Conflict, InvalidInput, OutOfSpace, SllmError
from schema.states import InstanceState, NodeState, Tier
from schema.tables import ClusterRow
from sllmctl.cluster.changes import PutEstimate, PutModel, RemoveCheckpointRow, RemoveInstance, RemoveModelRow, RemovePlacement
from sllmctl.state import Database
from sllmctl.state.engines import database_path, write_engine
from tests.sllmctl.state import rows


async def test_what_is_committed_is_loaded_again(url: str, tmp_path: Path) -> None:
    database = await Database.open(url, backup_dir=tmp_path)
    await database.commit(rows.whole())
    await database.close()
    database = await Database.open(url, backup_dir=tmp_path)
    view = await database.load()
    await database.close()
    node, instance, model = view.nodes["n1"], view.instances["inst_1"], view.models["m"]
    assert (node.name, node.state, node.cordoned, node.seen_at) == ("local", NodeState.READY, False, 2.0)
    assert view.checkpoints[rows.DIGEST].image_bytes == 1 << 40
    assert view.placements_on("n1")[rows.DIGEST, "n1", Tier.DISK, 0].size_bytes == 1 << 40
    put_model, put = rows.whole()[2], rows.whole()[4]
    assert isinstance(put_model, PutModel)
    assert (model.spec, model.digest, model.op, model.fault) == (put_model.spec, rows.DIGEST, "op_1", put_model.fault)
    assert (instance.epoch, instance.state, instance.devices) == (rows.EPOCH, InstanceState.BACKOFF, (0, 2))
    assert (instance.phases, instance.fault) == (put.truth.phases, put.truth.fault)
    assert (instance.working_bytes, instance.restarts, instance.retry_at, instance.reason) == (1 << 33, 2, 99.5, "why")
    assert view.memory.committed_bytes["n1", 2] == 1 << 33


async def test_put_updates_without_cascading_and_remove_takes_rows_away(database: Database) -> None:
    await database.commit(rows.whole())
    await database.commit([rows.node(seen_at=50.0)])
    view = await database.load()
    assert view.nodes["n1"].seen_at == 50.0
    assert view.placements
    gone = [
        RemoveInstance("inst_1"),
        RemoveModelRow("m"),
        RemovePlacement(rows.DIGEST, "n1", Tier.DISK, 0),
        RemoveCheckpointRow(rows.DIGEST),
    ]
    await database.commit(gone)
    view = await database.load()
    assert [len(kind) for kind in (view.instances, view.models, view.placements, view.checkpoints)] == [0, 0, 0, 0]
    assert view.nodes


async def test_a_commit_is_all_or_nothing(database: Database) -> None:
    orphan = rows.whole()[4]
    with pytest.raises(SllmError, match="FOREIGN KEY"):
        await database.commit([rows.event(1), orphan])
    assert await database.events() == []
    assert not (await database.load()).instances


async def test_generations_grow_and_the_uuid_stays(url: str, tmp_path: Path) -> None:
    seen = []
    for number in range(3):
        database = await Database.open(url, backup_dir=tmp_path)
        seen.append(await database.claim(10.0, f"uuid-{number}"))
        await database.close()
    assert [(one.uuid, one.generation) for one in seen] == [("uuid-0", 1), ("uuid-0", 2), ("uuid-0", 3)]


async def test_events_by_object_page_and_are_cut(url: str, tmp_path: Path) -> None:
    database = await Database.open(url, backup_dir=tmp_path, events_keep=20)
    for number in range(60):
        await database.commit([rows.event(number, name="even" if number % 2 == 0 else "odd")])
    everything = await database.events(limit=1000)
    assert 20 <= len(everything) <= 23
    assert [one.message for one in everything] == [str(number) for number in range(60 - len(everything), 60)]
    assert [one.message for one in await database.events(limit=2)] == ["58", "59"]
    assert [one.message for one in await database.events(kind="model", object="odd", limit=2)] == ["57", "59"]
    assert [one.message for one in await database.events(after="ev_00000056", limit=2)] == ["57", "58"]
    assert [one.message for one in await database.events(after="ev_00000003", limit=1)] == [everything[0].message]
    assert await database.events(kind="node") == []
    await database.commit([rows.event(60, kind="checkpoint", name="ab" * 32), rows.event(61, name="ab_")])
    assert [one.message for one in await database.events(object="abab")] == ["60"]
    assert [one.message for one in await database.events(object="ab_")] == ["61"], "it is no pattern"
    await database.close()


async def test_what_was_learned_is_kept_and_outcomes_are_cut(url: str, tmp_path: Path) -> None:
    database = await Database.open(url, backup_dir=tmp_path, outcomes_keep=20)
    await database.commit([PutEstimate("bps/n/disk", (1e9, 2e9), 5.0), PutEstimate("build/d/cpu", (0.1,), 5.0)])
    await database.commit([PutEstimate("bps/n/disk", (2e9, 3e9), 6.0)])
    for number in range(60):
        await database.commit([_outcome(number)])
    await database.close()
    database = await Database.open(url, backup_dir=tmp_path)
    assert await database.estimates() == [
        PutEstimate("bps/n/disk", (2e9, 3e9), 6.0),
        PutEstimate("build/d/cpu", (0.1,), 5.0),
    ]
    kept = await database.outcomes(limit=1000)
    assert 20 <= len(kept) <= 23
    assert kept == [_outcome(number) for number in range(60 - len(kept), 60)]
    assert await database.outcomes(limit=2) == [_outcome(58), _outcome(59)]
    await database.close()


def _outcome(number: int) -> OutcomeView:
    return OutcomeView(at=number, kind="start", model="m", node="n", source="disk", estimated_s=1.0, actual_s=number / 10)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of another's may take as long as it does."""
    monkeypatch.setattr("sllmctl.state.engines._BUSY_TIMEOUT_MS", 120_000)


async def test_eight_tasks_that_read_and_then_write_lose_nothing(slow_disk: None, database: Database, url: str) -> None:
    await database.claim(1.0, "u")
    engine = write_engine(database_path(url)[0])

    async def bump() -> None:
        for _ in range(25):
            async with engine.begin() as connection:
                generation = (await connection.execute(select(ClusterRow.generation))).scalar_one()
                await asyncio.sleep(0)
                await connection.execute(update(ClusterRow).values(generation=generation + 1))

    claims = asyncio.gather(*(database.claim(1.0, "u") for _ in range(20)))
    await asyncio.gather(*(bump() for _ in range(8)))
    await claims
    await engine.dispose()
    assert (await database.claim(1.0, "u")).generation == 1 + 200 + 20 + 1


async def test_a_second_manager_is_refused_until_the_first_is_gone(database: Database, url: str, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match=f"another manager \\(pid {os.getpid()}\\)"):
        await Database.open(url, backup_dir=tmp_path)
    await database.close()
    second = await Database.open(url, backup_dir=tmp_path)
    await second.close()


async def test_a_newer_schema_is_refused_and_left_alone(database: Database, url: str, tmp_path: Path) -> None:
    await database.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(Conflict, match=r"9999.*0008"):
        await Database.open(url, backup_dir=tmp_path)
    connection = sqlite3.connect(tmp_path / "state.db")
    assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    connection.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, but long enough to be taken for one" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
async def test_a_damaged_file_is_named(url: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.db").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"state\.db is damaged.*restore a backup"):
        await Database.open(url, backup_dir=tmp_path)
    assert (tmp_path / "state.db").read_bytes() == content


@pytest.mark.parametrize(
    ("statement", "whose"),
    [
        ("UPDATE models SET spec = json_set(spec, '$.of_a_newer_build', 1)", "model m: .*of_a_newer_build"),
        ("UPDATE instances SET fault = '[]'", "instance inst_1"),
        ("UPDATE checkpoints SET step = '{'", f"checkpoint {rows.DIGEST[:12]}"),
        ("INSERT INTO estimates (key, samples, changed_at) VALUES ('bps/n1/disk', '[null]', 0)", "estimate bps/n1/disk"),
    ],
)
async def test_a_row_that_this_build_cannot_read_is_named(
    database: Database, tmp_path: Path, statement: str, whose: str
) -> None:
    await database.commit(rows.whole())
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute(statement)
    connection.close()

    async def read() -> None:
        await database.load()
        await database.estimates()

    with pytest.raises(InvalidInput, match=f"cannot read what the database holds of {whose}.*run the sllmctl that wrote it"):
        await read()


async def test_a_row_that_points_nowhere_is_damage(database: Database, url: str, tmp_path: Path) -> None:
    await database.commit(rows.whole())
    await database.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("DELETE FROM models")
    connection.close()
    with pytest.raises(InvalidInput, match=r"state\.db is damaged.*instances row .*restore a backup"):
        await Database.open(url, backup_dir=tmp_path)


async def test_a_directory_in_the_databases_place_is_a_setting_to_change(url: str, tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with pytest.raises(InvalidInput, match=r"cannot open the database .*state\.db: Is a directory"):
        await Database.open(url, backup_dir=tmp_path)


async def test_a_database_of_something_else_is_refused(url: str, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "state.db")
    connection.execute("CREATE TABLE accounts (id INTEGER)")
    connection.close()
    with pytest.raises(Conflict, match="tables of something else"):
        await Database.open(url, backup_dir=tmp_path)


@pytest.mark.parametrize("url", ["postgresql://host/db", "sqlite+aiosqlite://", "sqlite:///:memory:", "not a url"])
async def test_other_urls_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="database URL"):
        await Database.open(url, backup_dir=tmp_path)


_WRITER = """
import asyncio, sys
from sllmctl.state import Database
from tests.sllmctl.state.rows import event

async def main():
    database = await Database.open(sys.argv[1], backup_dir=sys.argv[2], events_keep=1_000_000)
    number = 0
    while True:
        await database.commit([event(number * 3 + part) for part in range(3)])
        number += 1
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_kill_9_in_the_middle_loses_no_acknowledged_commit(url: str, tmp_path: Path) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, url, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        acknowledged = 0
        while acknowledged < 40:
            acknowledged = int(await asyncio.wait_for(child.stdout.readline(), 60))
    finally:
        child.send_signal(signal.SIGKILL)
        rest, _ = await child.communicate()
    acknowledged = max([acknowledged, *(int(line) for line in rest.splitlines(keepends=True) if line.endswith(b"\n"))])
    database = await Database.open(url, backup_dir=tmp_path)
    events = await database.events(limit=1_000_000)
    await database.close()
    assert len(events) % 3 == 0
    assert len(events) >= acknowledged * 3
    assert [one.message for one in events] == [str(number) for number in range(len(events))]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
async def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = await asyncio.create_subprocess_exec(
        "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place), stderr=asyncio.subprocess.DEVNULL
    )
    if await mount.wait() != 0:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        database = await Database.open(f"sqlite+aiosqlite:///{place}/state.db", backup_dir=tmp_path)
        try:
            with pytest.raises(OutOfSpace, match=r"small/state\.db is full; .* make room there"):
                await _fill(database)
            written = await database.events(limit=1_000_000)
            assert len(written) > 0
            assert len(written) % 200 == 0
        finally:
            await database.close()
    finally:
        unmount = await asyncio.create_subprocess_exec("umount", str(place))
        assert await unmount.wait() == 0


async def _fill(database: Database) -> None:
    """Commit batches of 200 events until one fails."""
    written = 0
    while True:
        await database.commit([rows.event(written + part, name="x" * 100) for part in range(200)])
        written += 200

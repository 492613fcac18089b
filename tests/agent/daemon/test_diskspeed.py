"""The disk's speed: measured once a day per disk when the node is quiet, in nobody's way, and stated."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import NodeConfig
from agent.daemon import diskspeed
from agent.daemon.diskspeed import DiskSpeed
from agent.native import disk_speed
from agent.native.calibration import Tuning
from agent.native.disk_record import remembered
from schema.link import InventoryUpdate, LoadCheckpoint, OperationDone, Ping, Pong
from schema.states import InstanceState, Tier
from tests.agent.daemon.peers import DIGEST, WAIT_S, Manager, Node, make_checkpoint, start_instance

_BLOCKS = 8 << 20


@pytest.fixture(autouse=True)
def _small_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskspeed, "_AGAIN_S", 0.001)
    monkeypatch.setattr(diskspeed, "SCRATCH_BYTES", _BLOCKS)
    monkeypatch.setattr(disk_speed, "SCRATCH_BYTES", _BLOCKS)
    monkeypatch.setattr(diskspeed, "_LIMIT_S", WAIT_S)


class Look:
    """A measurement in one test: it takes until it is told to end, or `let` says what it found."""

    def __init__(self) -> None:
        self.files: list[Path | None] = []
        self.huge: list[bool] = []
        self.began = threading.Event()
        self.ended_early = 0
        self._found = 0.0
        self._let = threading.Event()

    def __call__(
        self, directory: Path, file: Path | None, *, huge: bool, threads: int, limit_s: float, stop: threading.Event
    ) -> float:
        self.files.append(file)
        self.huge.append(huge)
        self.began.set()
        while not self._let.wait(0.001):
            if stop.is_set():
                self.ended_early += 1
                return 0.0
        return self._found

    def let(self, found: float) -> None:
        self._found = found
        self._let.set()


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    made = Look()
    monkeypatch.setattr(diskspeed, "measure_read_bps", made)
    return made


@pytest.fixture
async def fresh() -> Node:
    """A node with one checkpoint, not begun yet."""
    node = Node()
    make_checkpoint(node.config.checkpoints_path)
    return node


def config_in(directory: Path) -> NodeConfig:
    config = NodeConfig(run_dir=str(directory / "run"), data_dir=str(directory))
    config.checkpoints_path.mkdir()
    return config


def quiet() -> bool:
    return False


def small_pages() -> bool:
    """The arena's pages."""
    return False


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


def remember(config: NodeConfig, *, ago_s: float = 60.0, **fields: Any) -> Path:
    here = {"path": str(config.checkpoints_path), "device": config.checkpoints_path.stat().st_dev, "read_bps": 3e9}
    place = Path(config.data_dir) / "disk.json"
    place.write_bytes(msgspec.json.encode({**here, "measured_at": time.time() - ago_s, **fields}))
    return place


async def test_what_was_measured_today_is_not_measured_again(tmp_path: Path, look: Look) -> None:
    config = config_in(tmp_path)
    place = remember(config)
    before = place.read_bytes()
    speed = DiskSpeed(config, quiet, small_pages)
    assert speed.read_bps == 3e9
    await speed.run()
    assert (speed.read_bps, place.read_bytes(), look.files) == (3e9, before, [])


@pytest.mark.parametrize(
    "odd",
    [
        {"ago_s": 90_000.0},
        {"ago_s": -3600.0},
        {"device": -1},
        {"path": "/elsewhere/checkpoints"},
        {"read_bps": -1.0},
        {"read_bps": 0.0},
        {"read_bps": "fast"},
        {"by": "another program"},
    ],
    ids=str,
)
async def test_what_does_not_hold_is_measured_anew(tmp_path: Path, look: Look, odd: dict[str, Any]) -> None:
    config = config_in(tmp_path)
    remember(config, **odd)
    speed = DiskSpeed(config, quiet, small_pages)
    assert speed.read_bps == 0
    look.let(2e9)
    await speed.run()
    assert (speed.read_bps, DiskSpeed(config, quiet, small_pages).read_bps) == (2e9, 2e9)


async def test_an_arena_of_other_pages_is_another_measurement(tmp_path: Path, look: Look) -> None:
    config = config_in(tmp_path)
    remember(config)
    look.let(4e9)
    speed = DiskSpeed(config, quiet, lambda: True)
    assert speed.read_bps == 3e9, "it is stated until there is a better figure"
    await speed.run()
    assert (speed.read_bps, look.huge) == (4e9, [True])
    again = DiskSpeed(config, quiet, lambda: True)
    await again.run()
    assert (again.read_bps, look.huge) == (4e9, [True])
    await DiskSpeed(config, quiet, small_pages).run()
    assert look.huge == [True, False]


@pytest.mark.parametrize("content", [b"", b'{"path": "/tm', b'{"path": "\xff"}', b"\x00\x01", b"[]"])
def test_a_file_that_is_none_of_ours_is_ignored(tmp_path: Path, content: bytes) -> None:
    config = config_in(tmp_path)
    (tmp_path / "disk.json").write_bytes(content)
    assert DiskSpeed(config, quiet, small_pages).read_bps == 0


async def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    speed = DiskSpeed(config, quiet, small_pages)
    await speed.run()
    assert speed.read_bps > 0
    assert DiskSpeed(config, quiet, small_pages).read_bps == speed.read_bps
    assert names(tmp_path) == ["checkpoints", "disk.json"]


async def test_the_largest_file_of_a_checkpoint_is_read_if_it_is_large_enough(tmp_path: Path, look: Look) -> None:
    config = config_in(tmp_path)
    look.let(1e9)
    small, large, largest = (config.checkpoints_path / name / "l1" / "part-0" for name in "abc")
    for file, size_bytes in ((small, _BLOCKS - 1), (large, _BLOCKS), (largest, _BLOCKS + 1)):
        await DiskSpeed(config, quiet, small_pages).run()
        (tmp_path / "disk.json").unlink()
        file.parent.mkdir(parents=True)
        with file.open("wb") as out:
            out.truncate(size_bytes)
    await DiskSpeed(config, quiet, small_pages).run()
    assert look.files == [None, None, large, largest]


async def test_it_does_nothing_once_closed(tmp_path: Path, look: Look) -> None:
    speed = DiskSpeed(config_in(tmp_path), quiet, small_pages)
    speed.close()
    await speed.run()
    assert (speed.read_bps, look.files) == (0, [])


async def test_closing_ends_a_measurement(tmp_path: Path, look: Look) -> None:
    speed = DiskSpeed(config_in(tmp_path), quiet, small_pages)
    running = asyncio.create_task(speed.run())
    await asyncio.to_thread(look.began.wait, WAIT_S)
    speed.close()
    await running
    assert (speed.read_bps, look.ended_early) == (0, 1)


async def test_a_directory_that_cannot_be_used_costs_only_the_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    speed = DiskSpeed(NodeConfig(run_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "nowhere")), quiet, small_pages)
    await speed.run()
    assert speed.read_bps == 0
    assert "cannot measure" in caplog.text


async def test_a_figure_that_cannot_be_remembered_is_used(tmp_path: Path, look: Look, caplog: pytest.LogCaptureFixture) -> None:
    config = config_in(tmp_path)
    (tmp_path / "disk.json").mkdir()
    look.let(2e9)
    speed = DiskSpeed(config, quiet, small_pages)
    await speed.run()
    assert speed.read_bps == 2e9
    assert "cannot remember" in caplog.text


async def test_the_truth_states_what_is_remembered(fresh: Node) -> None:
    remember(fresh.config, read_bps=2.5e9)
    async with fresh as node:
        assert (await node.manager()).truth.inventory.disk_read_bps == 2.5e9


async def test_what_was_measured_is_told(fresh: Node, look: Look) -> None:
    async with fresh as node:
        manager = await node.manager()
        assert manager.truth.inventory.disk_read_bps == 0
        await node.until(lambda: bool(look.files))
        look.let(2e9)
        told = await manager.take(InventoryUpdate, lambda m: bool(m.inventory.disk_read_bps))
        assert told.inventory.disk_read_bps == 2e9
        assert (await node.manager()).truth.inventory.disk_read_bps == 2e9


async def test_nothing_is_measured_before_the_nodes_processes_serve(fresh: Node, look: Look) -> None:
    fresh.kin_dial = False
    async with fresh as node:
        stranger = await node.dial_manager()
        await node.until(lambda: len(node.pids) == 2)
        assert not look.files
        node.play("store", node.pids[0])
        await stranger.whole_truth()
        await turns(stranger)
        assert not look.files
        node.play("zygote", node.pids[1])
        await node.until(lambda: bool(look.files))


@pytest.mark.parametrize("command", [start_instance(), LoadCheckpoint(op="op_1", digest=DIGEST, tier=Tier.DRAM)], ids=str)
async def test_a_measurement_gives_way_and_waits_until_the_load_is_over(fresh: Node, look: Look, command: Any) -> None:
    fresh.store_answers = False
    async with fresh as node:
        manager = await node.manager()
        await node.until(lambda: len(look.files) == 1)
        manager.send(command)
        store = node.stores[0]
        await store.until(lambda: bool(store.fills))
        await node.until(lambda: look.ended_early == 1)
        await turns(manager)
        assert len(look.files) == 1
        look.let(2e9)
        store.answer(store.fills[0])
        if isinstance(command, LoadCheckpoint):
            await manager.take(OperationDone)
        else:
            await manager.instance(InstanceState.READY)
        await node.until((Path(node.config.data_dir) / "disk.json").exists)
        assert len(look.files) == 2


async def turns(manager: Manager, count: int = 20) -> None:
    """Some turns of the agent's loop, in each of which it looks again."""
    for nonce in range(1, count):
        manager.send(Ping(nonce=nonce))
        await manager.take(Pong)


def weights_in(config: NodeConfig) -> None:
    directory = config.checkpoints_path / DIGEST / "exec1"
    directory.mkdir(parents=True)
    (directory / "partition_0.bin").write_bytes(bytes(_BLOCKS))


async def test_how_it_is_read_best_is_found_out_once_and_remembered(
    tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    remember(config)
    weights_in(config)
    busy = [False, True, False]
    asked: list[bool] = []

    def calibrate(file: Path, *, huge: bool, limit_s: float, stop: threading.Event) -> Tuning | None:
        asked.append(stop.is_set())
        if len(asked) == 1:
            speed.give_way()
            return None
        return Tuning(8 << 20, 16)

    monkeypatch.setattr(diskspeed, "calibrate", calibrate)
    speed = DiskSpeed(config, lambda: busy.pop(0) if busy else False, small_pages)
    await speed.run()
    assert asked == [False, False]
    record = remembered(Path(config.data_dir) / "disk.json", config.checkpoints_path)
    assert record is not None
    assert (record.read_bps, record.tuning) == (3e9, Tuning(8 << 20, 16))
    await DiskSpeed(config, quiet, small_pages).run()
    assert len(asked) == 2


async def test_without_anything_to_read_nothing_is_calibrated(
    tmp_path: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    remember(config)
    monkeypatch.setattr(diskspeed, "calibrate", None)
    await DiskSpeed(config, quiet, small_pages).run()

"""The disk's speed: measured once a day per disk, in nobody's way, and stated."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
import pytest

from agent.config import NodeConfig
from agent.daemon.diskspeed import DiskSpeed
from tests.agent.daemon.peers import Node


def config_in(directory: Path) -> NodeConfig:
    config = NodeConfig(run_dir=str(directory / "run"), data_dir=str(directory))
    config.checkpoints_path.mkdir()
    return config


def remember(config: NodeConfig, *, read_bps: float = 3e9, ago_s: float = 60.0, device: int | None = None) -> Path:
    here = config.checkpoints_path.stat().st_dev if device is None else device
    place = Path(config.data_dir) / "disk.json"
    place.write_bytes(msgspec.json.encode({"device": here, "measured_at": time.time() - ago_s, "read_bps": read_bps}))
    return place


async def test_what_was_measured_today_is_not_measured_again(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    place = remember(config)
    before = place.read_bytes()
    speed = DiskSpeed(config)
    assert speed.read_bps == 3e9
    await speed.run()
    assert (speed.read_bps, place.read_bytes()) == (3e9, before)


@pytest.mark.parametrize("odd", ["old", "from the future", "another disk", "torn", "negative"])
def test_what_does_not_hold_any_more_is_forgotten(tmp_path: Path, odd: str) -> None:
    config = config_in(tmp_path)
    device = config.checkpoints_path.stat().st_dev
    ago_s = {"old": 90_000.0, "from the future": -3600.0}.get(odd, 60.0)
    read_bps = -1.0 if odd == "negative" else 3e9
    place = remember(config, ago_s=ago_s, device=device + (odd == "another disk"), read_bps=read_bps)
    if odd == "torn":
        place.write_bytes(place.read_bytes()[:20])
    assert DiskSpeed(config).read_bps == 0


async def test_a_measurement_is_remembered_for_the_next_life(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDONLY | os.O_DIRECT, 0o600))
    except OSError:
        pytest.skip("the file system of the temporary directory knows no direct I/O")
    part = config.checkpoints_path / "d" / "l1" / "part-0"
    part.parent.mkdir(parents=True)
    with part.open("wb") as file:  # large enough to be read in place of a file made for it
        for _ in range(64):
            file.write(bytes(1 << 20))
    speed = DiskSpeed(config)
    assert speed.read_bps == 0
    await speed.run()
    assert speed.read_bps > 0
    assert DiskSpeed(config).read_bps == speed.read_bps


async def test_a_measurement_gives_way_and_ends_with_its_owner(tmp_path: Path) -> None:
    speed = DiskSpeed(config_in(tmp_path))
    running = asyncio.create_task(speed.run())
    await asyncio.sleep(0)
    speed.give_way()
    speed.close()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_it_does_nothing_once_closed(tmp_path: Path) -> None:
    speed = DiskSpeed(config_in(tmp_path))
    speed.close()
    await speed.run()
    assert speed.read_bps == 0


async def test_a_directory_that_cannot_be_used_costs_only_the_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = NodeConfig(run_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "nowhere"))
    speed = DiskSpeed(config)
    await speed.run()
    assert speed.read_bps == 0
    assert "cannot measure" in caplog.text


async def test_the_truth_states_what_is_remembered() -> None:
    node = Node()
    node.config.checkpoints_path.mkdir(parents=True, exist_ok=True)
    remember(node.config, read_bps=2.5e9)
    async with node:
        assert (await node.manager()).truth.inventory.disk_read_bps == 2.5e9

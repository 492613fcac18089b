"""What this machine has: cores, memory, the devices that instances may use, the disk's budget."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from pathlib import Path

from agent.config import NodeConfig
from agent.native.device import budget_bytes, find_devices
from agent.store.budget import used_bytes
from schema.link import ArenaInfo, DeviceInfo, Inventory

__all__ = ["devices", "inventory"]


def devices(config: NodeConfig) -> tuple[DeviceInfo, ...]:
    """The devices of this node, with the memory that the settings give to instances: what the driver knows, else its processors
    as device 0. Raises NoDriver or DeviceError when the settings ask for devices that are not there."""
    _, found = find_devices(config.devices)
    if found:
        budget = config.device_bytes
        return tuple(
            DeviceInfo(index=device.index, kind="cuda", name=device.name, memory_bytes=budget_bytes(budget, device))
            for device in found
        )
    memory = config.device_bytes or _memory_bytes() // 2
    return (DeviceInfo(index=0, kind="cpu", name=_processor_name(), memory_bytes=memory),)


def inventory(config: NodeConfig, arena: ArenaInfo | None) -> Inventory:
    """The machine's means. Before the store has spoken, ``arena`` is None and its budget is what the settings say."""
    data = config.checkpoints_path.parent
    used = used_bytes(data)
    room = used + _free_bytes(data)
    return Inventory(
        hostname=socket.gethostname(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        devices=devices(config),
        arena=arena or ArenaInfo(id="", budget_bytes=config.arena_bytes, chunk_bytes=config.chunk_bytes),
        disk_budget_bytes=min(config.disk_bytes or room, room),
        disk_used_bytes=used,
    )


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_bytes(path: Path) -> int:
    existing = next(candidate for candidate in (path, *path.parents) if candidate.is_dir())
    return shutil.disk_usage(existing).free


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.machine()

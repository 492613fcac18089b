"""A node's settings: set where the manager is set, and given to the node's agent as JSON."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from schema.logs import LogFormat, LogLevel
from schema.remote import RemoteSettings

__all__ = ["NodeSettings"]

_Seconds = Annotated[float, Meta(ge=0)]
_Bytes = Annotated[int, Meta(ge=0)]


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Directories, budgets and every timeout of a node's processes.

    ``arena_bytes``: the DRAM tier. ``disk_bytes``: what checkpoints may take of the disk; 0 is all that is free.
    ``devices``: "auto" takes the CUDA devices that the driver knows, and the processors where
    there are none; "cpu" or "cuda" take only those. ``device_bytes``: what instances may use of each device, KV caches
    included; 0 is nine tenths of a CUDA device's memory, and half of the machine's for the processors. ``threads``: of a
    worker on CPU; 0 is all cores.

    ``manager_grace_s``: without a manager for so long, the agent stops what is idle and frees its devices.
    ``agent_grace_s``: without an agent for so long, store, zygote and workers end themselves. ``adopt_s``: how long a new agent
    waits for kin that is alive (its lock is held) to dial before it makes another; what is younger than ``spawn_s`` has that
    time. ``spawn_s``: how long a child may take to dial. ``start_s``: how long an instance may take from its weights being
    there to ready. ``hang_s``: a store, zygote or ready worker that does not answer for so long is killed; longer than any
    engine step takes. ``remote``: how this node publishes and fetches.
    """

    run_dir: str
    data_dir: str
    arena_bytes: _Bytes = 1 << 30
    chunk_bytes: Annotated[int, Meta(ge=2 << 20, multiple_of=2 << 20)] = 4 << 20
    devices: Literal["auto", "cpu", "cuda"] = "auto"
    device_bytes: _Bytes = 0
    disk_bytes: _Bytes = 0
    threads: Annotated[int, Meta(ge=0)] = 0
    reader_threads: Annotated[int, Meta(ge=1, le=64)] = 4
    manager_grace_s: _Seconds = 600.0
    agent_grace_s: _Seconds = 60.0
    adopt_s: _Seconds = 5.0
    spawn_s: _Seconds = 60.0
    start_s: _Seconds = 300.0
    hang_s: Annotated[float, Meta(gt=0)] = 300.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "console"
    remote: RemoteSettings = RemoteSettings()

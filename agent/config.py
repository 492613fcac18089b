"""A node's settings: one typed struct, given to the agent as JSON, left by it in its run directory for its kin.

The run directory holds ``agent.sock``, ``agent.token`` (0600: what makes a dialler kin), ``node.json`` (this struct),
``roster.json`` (its processes, for the agent's next life), and a lock file per process (``agent.lock``, ``store.lock``,
``zygote.lock``), held with flock while the process lives. The data directory holds ``identity.json`` (name, cluster, newest
generation seen), ``disk.json`` (how fast the checkpoints' disk reads), ``checkpoints/<digest>/<layout>/``, ``tmp/`` for what is
being ingested or removed, ``partial/`` for what is being fetched, and ``log/`` with a file per process and, in its
``instances/``, one per instance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput
from schema.logs import LogFormat
from schema.remote import RemoteSettings

__all__ = ["NodeConfig", "load_config", "parse_config"]

_Seconds = Annotated[float, Meta(ge=0)]
_Bytes = Annotated[int, Meta(ge=0)]


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Directories, budgets and every timeout of a node's processes.

    ``arena_bytes``: the DRAM tier. ``disk_bytes``: what checkpoints may take of the disk; 0 is all that is free.
    ``devices``: "auto" takes the CUDA devices that the driver knows, and the processors where
    there are none; "cpu" or "cuda" take only those. ``device_bytes``: what instances may use of each device, KV caches
    included; 0 is nine tenths of a CUDA device's memory, and half of the machine's for the processors. ``threads``: of a
    worker on CPU; 0 is all cores.

    ``manager_grace_s``: without a manager for so long, the agent stops what is idle and frees its devices.
    ``agent_grace_s``: without an agent for so long, store, zygote and workers end themselves. ``adopt_s``: how long a new agent
    waits for kin that is alive (its lock is held) to dial before it makes another. ``spawn_s``: how long a child may take
    to dial. ``start_s``: how long an instance may take from its weights being there to ready. ``hang_s``: a store, zygote
    or ready worker that does not answer for so long is killed; longer than any engine step takes. ``remote``: how this node
    publishes and fetches.
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
    log_level: str = "info"
    log_format: LogFormat = "console"
    remote: RemoteSettings = RemoteSettings()

    @property
    def socket_path(self) -> Path:
        return Path(self.run_dir) / "agent.sock"

    @property
    def token_path(self) -> Path:
        return Path(self.run_dir) / "agent.token"

    @property
    def checkpoints_path(self) -> Path:
        return Path(self.data_dir) / "checkpoints"

    @property
    def skeletons_path(self) -> Path:
        return Path(self.data_dir) / "skeletons"

    @property
    def log_path(self) -> Path:
        return Path(self.data_dir) / "log"

    def lock_path(self, role: str) -> Path:
        return Path(self.run_dir) / f"{role}.lock"


def parse_config(text: str | bytes) -> NodeConfig:
    """The settings from JSON. Raises InvalidInput naming the key at fault, or a run directory too long for a socket."""
    try:
        config = msgspec.json.decode(text, type=NodeConfig)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"node settings: {error}") from error
    if len(str(config.socket_path).encode()) > 100:
        raise InvalidInput(f"the run directory {config.run_dir} is too long for a unix socket; choose a shorter one", "run_dir")
    return config


def load_config(run_dir: Path) -> NodeConfig:
    """The settings that the agent left for its kin. Raises InvalidInput when they are not there or not readable."""
    try:
        return parse_config((run_dir / "node.json").read_bytes())
    except OSError as error:
        raise InvalidInput(f"cannot read the node's settings in {run_dir}: {error}") from error

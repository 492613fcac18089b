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

import msgspec

from schema.errors import InvalidInput
from schema.nodesettings import NodeSettings

__all__ = ["NodeConfig", "load_config", "parse_config"]


class NodeConfig(NodeSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings, and where things lie by them."""

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

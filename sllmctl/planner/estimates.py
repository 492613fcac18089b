"""How long starts and migrations take: coefficients that begin as assumptions and are corrected by what happens.

``startup = max(queue + bytes / bandwidth, build) + finish``: the weights come while the worker is built; then they are
attached and the first step is run. The path's slowest channel counts (ServerlessLLM, OSDI 2024, section 6: q + n/b).
``migration = a * tokens + b`` (the same section), per checkpoint and kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from schema.link import StartPhases
from schema.states import Tier
from sllmctl.control.effects import PutEstimate
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import Checkpoint, Node

__all__ = ["Channel", "Estimates", "Startup"]


class Channel(StrEnum):
    """What loads queue for: a node's network, its disk, and the link to each of its devices."""

    NETWORK = "network"
    DISK = "disk"
    DEVICE = "device"


class Startup(msgspec.Struct, frozen=True):
    """An estimate in its parts; ``total_s`` is until the instance is ready."""

    queue_s: float
    load_s: float
    total_s: float


class Estimates:
    """Coefficients by key, and the loads under way on each channel. Holds no clock."""

    def __init__(self, settings: ControlSettings) -> None:
        raise NotImplementedError

    # --- reading ---

    def bandwidth_bps(self, node: Node, channel: Channel) -> float:
        raise NotImplementedError

    def startup(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], source: Tier, peer: str, now: float
    ) -> Startup:
        """A start on these devices (their number counts for the bytes of each) with weights from ``source``."""
        raise NotImplementedError

    def migration_s(self, digest: str, kind: str, tokens: int) -> float:
        """Recomputing a sequence of so many tokens on a device of this kind."""
        raise NotImplementedError

    # --- loads under way ---

    def began(
        self, load: str, node: Node, checkpoint: Checkpoint, devices: Sequence[int], source: Tier, peer: str, now: float
    ) -> None:
        """A load (named by its instance) takes its place in the queue of each channel on its path."""
        raise NotImplementedError

    def ended(self, load: str, now: float) -> None:
        """It is done or given up; unknown ones are passed over."""
        raise NotImplementedError

    # --- learning ---

    def started(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], phases: StartPhases, now: float
    ) -> list[PutEstimate]:
        """Learn from a start; returns the coefficients that changed."""
        raise NotImplementedError

    def prefilled(self, digest: str, kind: str, tokens: int, seconds: float, now: float) -> list[PutEstimate]:
        """Learn from a prefill."""
        raise NotImplementedError

    def restore(self, rows: Sequence[PutEstimate]) -> None:
        """Take up what was known before."""
        raise NotImplementedError

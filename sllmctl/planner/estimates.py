"""How long starts and migrations take: coefficients that begin as assumptions and are corrected by what happens.

``startup = max(queue + bytes / bandwidth, build) + finish``: the weights come while the worker is built; then they are
attached and the first step is run. The path's slowest channel counts (ServerlessLLM, OSDI 2024, section 6: q + n/b).
``migration = a * tokens + b`` (the same section), per checkpoint and kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from schema.link import Inventory, StartPhases
from schema.states import Tier
from sllmctl.control.effects import PutEstimate
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import Checkpoint, Node
from sllmctl.planner.coefficients import Line, Window
from sllmctl.planner.loads import ChannelKey, Loads

__all__ = ["Channel", "Estimates", "Startup"]

_LEAST_LOAD_BYTES = 16 << 20
"""Smaller loads are mostly latency and teach no bandwidth."""


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
    """Coefficients by key, and the loads under way on each channel. Holds no clock.

    Keys: ``bps/NODE/CHANNEL``; ``build/DIGEST/KIND`` and ``finish/DIGEST/KIND``, seconds; ``prefill/DIGEST/KIND``, pairs of
    tokens and seconds. An empty digest stands for all checkpoints on that kind of device, which a new one takes after.
    """

    def __init__(self, settings: ControlSettings) -> None:
        self._settings = settings
        self._windows: dict[str, Window] = {}
        self._lines: dict[str, Line] = {}
        self._loads = Loads()
        self._queued_s: dict[tuple[str, str], float] = {}
        # What is read for every node that a plan looks at, by node and by checkpoint; made again when something was learned.
        self._speeds: dict[str, tuple[Inventory | None, float, float, float, str]] = {}
        self._fixed: dict[tuple[str, str], tuple[float, float]] = {}

    # --- reading ---

    def bandwidth_bps(self, node: Node, channel: Channel) -> float:
        """As learned, as the node has measured it, or as assumed."""
        _, network, disk, device, _ = self._of(node)
        return disk if channel is Channel.DISK else device if channel is Channel.DEVICE else network

    def startup(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], source: Tier, peer: str, now: float
    ) -> Startup:
        """A start on these devices (their number counts for the bytes of each) with weights from ``source``."""
        build_s, finish_s = self._fixed_s(checkpoint.digest, self._of(node)[4])
        queue_s = load_s = 0.0
        for key, seconds in self._path(node, checkpoint, devices, source, peer):
            load_s = max(load_s, seconds)
            queue_s = max(queue_s, self._loads.wait_s(key, now))
        return Startup(queue_s, load_s, max(queue_s + load_s, build_s) + finish_s)

    def migration_s(self, digest: str, kind: str, tokens: int) -> float:
        """Recomputing a sequence of so many tokens on a device of this kind."""
        return self._line(digest, kind).at(tokens)

    def coefficients(self) -> dict[str, float]:
        """All that was learned, by key; a prefill's two numbers as ``.../a`` (per token) and ``.../b``."""
        found = {key: window.value for key, window in self._windows.items()}
        for key, line in self._lines.items():
            found |= {f"{key}/a": line.slope, f"{key}/b": line.base}
        return dict(sorted(found.items()))

    # --- loads under way ---

    def began(
        self, load: str, node: Node, checkpoint: Checkpoint, devices: Sequence[int], source: Tier, peer: str, now: float
    ) -> None:
        """A load (named by its instance) takes its place in the queue of each channel on its path."""
        path = self._path(node, checkpoint, devices, source, peer)
        self._queued_s[node.id, checkpoint.digest] = max((self._loads.wait_s(key, now) for key, _ in path), default=0.0)
        self._loads.begin(load, path, now)

    def ended(self, load: str, now: float) -> None:
        """It is done or given up; unknown ones are passed over."""
        self._loads.end(load, now)

    # --- learning ---

    def started(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], phases: StartPhases, now: float
    ) -> list[PutEstimate]:
        """Learn from a start; returns the coefficients that changed."""
        kind = self._of(node)[4]
        rows: list[PutEstimate] = []
        build_s = phases.fork_s + phases.build_s
        finish_s = max(0.0, phases.total_s - max(phases.load_s, build_s))
        for digest in (checkpoint.digest, ""):
            rows.append(self._learn(f"build/{digest}/{kind}", build_s, self._settings.start_base_s, now))
            rows.append(self._learn(f"finish/{digest}/{kind}", finish_s, 0.0, now))
        self._fixed.clear()
        source = phases.loaded_from
        if source is None or self._queued_s.pop((node.id, checkpoint.digest), 1.0) > 0.0:
            # It may have stood in a queue for a part of its load.
            return rows
        path = self._path(node, checkpoint, devices, source, "")
        if path and phases.load_s > 0 and checkpoint.image_bytes >= _LEAST_LOAD_BYTES:
            # A load says how fast its slowest channel was, and of the others only that they were not slower.
            (_, name, _), _ = max(path, key=lambda part: part[1])
            size_bytes = checkpoint.image_bytes / (len(devices) if name == Channel.DEVICE else 1)
            assumed = self.bandwidth_bps(node, Channel(name))
            rows.append(self._learn(f"bps/{node.id}/{name}", size_bytes / phases.load_s, assumed, now))
            self._speeds.pop(node.id, None)
        return rows

    def prefilled(self, digest: str, kind: str, tokens: int, seconds: float, now: float) -> list[PutEstimate]:
        """Learn from a prefill."""
        rows: list[PutEstimate] = []
        for owner in (digest, ""):
            key = f"prefill/{owner}/{kind}"
            line = self._lines.get(key)
            if line is None:
                typical = self._line(owner, kind)
                line = self._lines[key] = Line(typical.slope, typical.base)
            line.add(tokens, seconds)
            rows.append(PutEstimate(key, line.samples, now))
        return rows

    def restore(self, rows: Sequence[PutEstimate]) -> None:
        """Take up what was known before; what cannot be understood any more is passed over and learned anew."""
        for row in rows:
            if row.key.startswith("prefill/"):
                pairs = list(zip(row.samples[::2], row.samples[1::2], strict=False))
                self._lines[row.key] = Line(self._settings.prefill_token_s, self._settings.prefill_base_s, pairs)
            elif row.samples and row.key.startswith(("bps/", "build/", "finish/")):
                self._windows[row.key] = Window(row.samples)
        self._speeds.clear()
        self._fixed.clear()

    # --- parts ---

    def _of(self, node: Node) -> tuple[Inventory | None, float, float, float, str]:
        """(inventory it was made of, network, disk, device link, kind of device)."""
        known = self._speeds.get(node.id)
        if known is not None and known[0] is node.inventory:
            return known
        means, settings = node.inventory, self._settings
        disk = (means.disk_read_bps if means is not None else 0.0) or settings.disk_read_bps
        device = (means.device_copy_bps if means is not None else 0.0) or settings.device_copy_bps
        kind = means.devices[0].kind if means is not None and means.devices else "cpu"
        known = self._speeds[node.id] = (
            means,
            self._learned(f"bps/{node.id}/{Channel.NETWORK}", settings.network_bps),
            self._learned(f"bps/{node.id}/{Channel.DISK}", disk),
            self._learned(f"bps/{node.id}/{Channel.DEVICE}", device),
            kind,
        )
        return known

    def _path(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], source: Tier, peer: str
    ) -> list[tuple[ChannelKey, float]]:
        """Each channel between the weights and the devices, with the seconds that they take on it."""
        if source is Tier.DEVICE:
            return []
        _, network, disk, link, kind = self._of(node)
        size_bytes = checkpoint.image_bytes
        path: list[tuple[ChannelKey, float]] = []
        if kind != "cpu":
            seconds = size_bytes / len(devices) / link
            path += [((node.id, Channel.DEVICE, device), seconds) for device in devices]
        if source is Tier.DISK:
            path.append(((node.id, Channel.DISK, 0), size_bytes / disk))
        elif source is Tier.REMOTE:
            path.append(((node.id, Channel.NETWORK, 0), size_bytes / network))
            if peer:
                path.append(((peer, Channel.NETWORK, 0), size_bytes / network))
        return path

    def _fixed_s(self, digest: str, kind: str) -> tuple[float, float]:
        """(building a worker, from the weights' arrival to ready)."""
        known = self._fixed.get((digest, kind))
        if known is None:
            typical_build_s = self._learned(f"build//{kind}", self._settings.start_base_s)
            typical_finish_s = self._learned(f"finish//{kind}", 0.0)
            known = self._fixed[digest, kind] = (
                self._learned(f"build/{digest}/{kind}", typical_build_s),
                self._learned(f"finish/{digest}/{kind}", typical_finish_s),
            )
        return known

    def _line(self, digest: str, kind: str) -> Line:
        line = self._lines.get(f"prefill/{digest}/{kind}") or self._lines.get(f"prefill//{kind}")
        return line or Line(self._settings.prefill_token_s, self._settings.prefill_base_s)

    def _learned(self, key: str, otherwise: float) -> float:
        window = self._windows.get(key)
        return otherwise if window is None else window.value

    def _learn(self, key: str, sample: float, assumed: float, now: float) -> PutEstimate:
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window.assumed(assumed)
        window.add(sample)
        return PutEstimate(key, window.samples, now)

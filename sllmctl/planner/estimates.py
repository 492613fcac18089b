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
from sllmctl.cluster.changes import PutEstimate
from sllmctl.cluster.records import Checkpoint, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.planner.coefficients import Line, Window
from sllmctl.planner.loads import ChannelKey, Loads, Record

__all__ = ["Channel", "Estimates", "Startup"]

_LEAST_LOAD_BYTES = 16 << 20
"""Smaller loads are mostly latency and teach no bandwidth."""
_RECORDS = 4096
"""So many loads are remembered until their starts are reported; the oldest of more teach nothing."""
_FETCHED = (Tier.DISK, Tier.REMOTE)


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
        self._records: dict[str, Record] = {}
        self._unreported: dict[tuple[str, str, tuple[int, ...]], Record] = {}
        # By node and checkpoint: the load that brings it there, and when it is expected.
        self._coming: dict[tuple[str, str], tuple[str, float]] = {}
        # What is read for every node that a plan looks at, by node and by checkpoint; made again when something was learned.
        self._speeds: dict[str, tuple[Inventory | None, float, float, float, str]] = {}
        self._fixed: dict[tuple[str, str], tuple[float, float]] = {}

    # --- reading ---

    def bandwidth_bps(self, node: Node, channel: Channel) -> float:
        """As learned, as the node has measured it, or as assumed."""
        _, network, disk, device, _ = self._of(node)
        return disk if channel is Channel.DISK else device if channel is Channel.DEVICE else network

    def startup(
        self,
        node: Node,
        checkpoint: Checkpoint,
        devices: Sequence[int],
        source: Tier,
        peer: str,
        now: float,
        *,
        later_s: float = 0.0,
    ) -> Startup:
        """A start on these devices (their number counts for the bytes of each) with weights from ``source``, that begins
        ``later_s`` after now.

        Where another load already brings them to the node, this one waits for that and goes on from memory.
        """
        build_s, finish_s = self._fixed_s(checkpoint.digest, self._of(node)[4])
        queue_s = load_s = 0.0
        coming = self._coming.get((node.id, checkpoint.digest)) if source in _FETCHED else None
        if coming is not None:
            source = Tier.DRAM
        for key, seconds in self._path(node, checkpoint, devices, source, peer):
            load_s = max(load_s, seconds)
            queue_s = max(queue_s, self._loads.wait_s(key, now + later_s))
        if coming is not None:
            queue_s = max(queue_s, coming[1] - now - later_s - load_s)
        import_s = max(0.0, self._import_s(node, now) - later_s)
        return Startup(queue_s, load_s, max(queue_s + load_s, import_s + build_s) + finish_s)

    def wait_s(self, node: Node, channel: Channel, now: float) -> float:
        """How long a load that begins now would wait for a node's network or disk."""
        return self._loads.wait_s((node.id, channel, 0), now)

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
        """A load (named by its instance) takes its place in the queue of each channel on its path. Without ``devices`` it ends
        in DRAM."""
        self.ended(load, now)
        place, where = (node.id, checkpoint.digest), source
        shared = source in _FETCHED and place in self._coming
        if shared:
            where = Tier.DRAM
        elif source in _FETCHED:
            expected = self.startup(node, checkpoint, devices, source, peer, now)
            self._coming[place] = (load, now + expected.queue_s + expected.load_s)
        path = self._path(node, checkpoint, devices, where, peer)
        last = [self._loads.last(key) for key, _ in path]
        ahead = None if shared else [self._records[other] for other in dict.fromkeys(last) if other is not None]
        record = self._records[load] = Record(place, source, path, ahead, now)
        key = (*place, tuple(devices))
        self._unreported.pop(key, None)
        self._unreported[key] = record
        if len(self._unreported) > _RECORDS:
            del self._unreported[next(iter(self._unreported))]
        self._loads.begin(load, path, now)

    def ended(self, load: str, now: float) -> None:
        """It is done or given up; unknown ones are passed over."""
        record = self._records.pop(load, None)
        if record is None:
            return
        record.close()
        self._loads.end(load, now)
        if self._coming.get(record.place, ("", 0.0))[0] == load:
            del self._coming[record.place]

    # --- learning ---

    def started(
        self, node: Node, checkpoint: Checkpoint, devices: Sequence[int], phases: StartPhases, now: float
    ) -> list[PutEstimate]:
        """Learn from a start; returns the coefficients that changed.

        How long it had to wait for a zygote says nothing of the next one.
        """
        kind = self._of(node)[4]
        rows: list[PutEstimate] = []
        built_s = phases.fork_s + phases.build_s
        build_s = max(0.0, built_s - phases.zygote_s)
        finish_s = max(0.0, phases.total_s - max(phases.load_s, built_s))
        for digest in (checkpoint.digest, ""):
            believed_build_s, believed_finish_s = self._fixed_s(digest, kind)
            rows.append(self._learn(f"build/{digest}/{kind}", build_s, believed_build_s, now))
            rows.append(self._learn(f"finish/{digest}/{kind}", finish_s, believed_finish_s, now))
        self._fixed.clear()
        record = self._unreported.pop((node.id, checkpoint.digest, tuple(devices)), None)
        if record is None:
            return rows
        load_s, source = record.alone_s(phases.load_s), phases.loaded_from
        if source is not record.source or not phases.loaded_bytes:
            return rows
        path = self._path(node, checkpoint, devices, source, "")
        if path and load_s > 0 and checkpoint.image_bytes >= _LEAST_LOAD_BYTES:
            # A load says how fast its slowest channel was, and of the others only that they were not slower.
            (_, name, _), _ = max(path, key=lambda part: part[1])
            size_bytes = checkpoint.image_bytes / (len(devices) if name == Channel.DEVICE else 1)
            assumed = self.bandwidth_bps(node, Channel(name))
            rows.append(self._learn(f"bps/{node.id}/{name}", size_bytes / load_s, assumed, now))
            self._speeds.pop(node.id, None)
        return rows

    def imported(self, node: Node, now: float) -> list[PutEstimate]:
        """Learn from a node whose zygote can fork now, how long one imports."""
        assert node.imports_since is not None
        took_s, assumed_s = now - node.imports_since, self._settings.import_s
        return [self._learn(f"import/{owner}", took_s, assumed_s, now) for owner in (node.id, "")]

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
            elif row.samples and row.key.startswith(("bps/", "build/", "finish/", "import/")):
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
        if kind != "cpu" and devices:
            seconds = size_bytes / len(devices) / link
            path += [((node.id, Channel.DEVICE, device), seconds) for device in devices]
        if source is Tier.DISK:
            path.append(((node.id, Channel.DISK, 0), size_bytes / disk))
        elif source is Tier.REMOTE:
            path.append(((node.id, Channel.NETWORK, 0), size_bytes / network))
            if peer:
                path.append(((peer, Channel.NETWORK, 0), size_bytes / network))
        return path

    def _import_s(self, node: Node, now: float) -> float:
        """Until a node can fork a worker. A zygote that is overdue is expected to take as long again."""
        if node.imports_since is None:
            return 0.0
        whole_s = self._learned(f"import/{node.id}", self._learned("import/", self._settings.import_s))
        passed_s = max(0.0, now - node.imports_since)
        return whole_s - passed_s if passed_s < whole_s else passed_s

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

"""The search for a place, class by class of where the weights come from: the device, DRAM, disk, another node.

Within a class the nodes with free room come first, the roomiest before the others, then those with the most room if what may
leave had left. A node whose start alone would cost more than the best place so far is passed over, and so is a crowded one
that could only be as good as a free one. A class has an end: settings.plan_nodes nodes, or `_ENOUGH` places without a queue,
or one for which nobody pays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from schema.states import Tier
from sllmctl.cluster.plans import Rejection
from sllmctl.cluster.records import Node
from sllmctl.planner.estimates import Channel
from sllmctl.planner.inquiry import CHEAP, Inquiry
from sllmctl.planner.spot import Option, Spots

__all__ = ["Search"]

_ENOUGH = 4
"""Places of one class without a queue that are compared: with so many, another is hardly better."""
_MISSED = 16
"""After so many nodes of a class on which nobody may leave, or not soon enough, the others are left for the next time; for
requests that have aged they are not."""
_FEW = 256
"""So many nodes of a class are sorted by their room at sight; of more, the indexes know the roomiest."""


class Search:
    """One plan: the nodes looked at, and what was found on each. Not ``bounded``, it looks at all nodes, and for everything."""

    def __init__(self, inquiry: Inquiry, *, bounded: bool = True) -> None:
        self._inquiry = inquiry
        self._view = inquiry.view
        self._fleet = inquiry.fleet
        self._asked = inquiry.asked
        self._spots = Spots(inquiry, bounded=bounded)
        self._bounded = bounded
        self._looked: dict[str, Option | Rejection] = {}
        self._best: Option | None = None

    # --- what was found ---

    @property
    def best(self) -> Option | None:
        """The cheapest place of those that were looked at."""
        return self._best

    def found(self) -> list[Option]:
        options = [one for one in self._looked.values() if isinstance(one, Option)]
        options.sort(key=lambda one: one.key)
        return options

    def rejected(self) -> dict[Rejection, int]:
        """How many nodes were rejected for what; with the candidates they are all that are not removed."""
        counts: dict[Rejection, int] = {}
        for verdict in self._looked.values():
            if not isinstance(verdict, Option):
                counts[verdict] = counts.get(verdict, 0) + 1
        total = len(self._fleet.open) + len(self._fleet.closed)
        fetch = self._inquiry.fetch
        closed = 0
        for node, reason in self._fleet.closed.items():
            if fetch or self._inquiry.holds(node):
                closed += 1
                counts[reason] = counts.get(reason, 0) + 1
        if fetch:
            holding = len(self._fleet.open)
        else:
            holding = self._count_holding() - closed
            if total > holding + closed:
                counts[Rejection.NO_COPY] = total - holding - closed
        left = holding - len(self._looked)
        if left > 0:
            if self._best is not None:
                counts[Rejection.SLOWER] = counts.get(Rejection.SLOWER, 0) + left
            else:
                self._count_full(counts, left)
        return counts

    def verdicts(self) -> Iterator[tuple[str, Option | Rejection]]:
        """What was found on every node that is not removed."""
        closed, fetch = self._fleet.closed, self._inquiry.fetch
        for name in self._view.nodes:
            if name in self._fleet.removed:
                continue
            verdict = self._looked.get(name)
            if verdict is not None:
                yield name, verdict
            elif name in closed and (fetch or self._inquiry.holds(name)):
                yield name, closed[name]
            else:
                yield name, Rejection.NO_COPY

    def _count_holding(self) -> int:
        """Nodes with a whole copy, closed ones included."""
        disk, dram, removed = self._inquiry.disk, self._inquiry.dram, self._fleet.removed
        count = len(disk)
        count += sum(node not in disk for node in dram)
        count += sum(node not in disk and node not in dram for node in self._inquiry.device)
        if removed:
            count -= sum(self._inquiry.holds(node) for node in removed)
        return count

    def _count_full(self, counts: dict[Rejection, int], left: int) -> None:
        """Nodes that the indexes rule out: too small for it, or in use."""
        asked, fleet = self._asked, self._fleet
        fits = not fleet.mixed and fleet.whole.count(asked.count, asked.least + asked.share) == len(fleet.open)
        if fits and asked.checkpoint.image_bytes <= fleet.least_arena_bytes - fleet.chunk_bytes:
            counts[Rejection.BUSY_DEVICE] = counts.get(Rejection.BUSY_DEVICE, 0) + left
            return
        for node in fleet.open if self._inquiry.fetch else self._holders():
            if node in fleet.open and node not in self._looked:
                reason = self._spots.too_small(fleet.open[node]) or Rejection.BUSY_DEVICE
                counts[reason] = counts.get(reason, 0) + 1

    def _holders(self) -> Iterator[str]:
        disk, dram = self._inquiry.disk, self._inquiry.dram
        yield from disk
        yield from (node for node in dram if node not in disk)
        yield from (node for node in self._inquiry.device if node not in disk and node not in dram)

    # --- looking ---

    def run(self) -> None:
        """Look at nodes, class by class."""
        inquiry, open_nodes = self._inquiry, self._fleet.open
        fetch = inquiry.fetch
        if not self._bounded:
            for name, node in open_nodes.items():
                if fetch or inquiry.holds(name):
                    self._look(node)
            return
        if not inquiry.options.locality:
            self._walk(open_nodes if fetch else dict.fromkeys(self._holders()), None)
            return
        for members, source in ((inquiry.device, Tier.DEVICE), (inquiry.dram, Tier.DRAM), (inquiry.disk, Tier.DISK)):
            if members:
                self._walk(members, source)
        if fetch:
            self._walk(open_nodes, Tier.REMOTE)

    def _walk(self, members: Mapping[str, object], source: Tier | None) -> None:
        """Look at the nodes of a class: those with room, then those where some leave, then those where the busy would."""
        open_nodes, looked, settings = self._fleet.open, self._looked, self._inquiry.settings
        seen = enough = missed = 0
        for crowded, name in self._by_room(members, source):
            node = open_nodes.get(name)
            if node is None or name in looked:
                continue
            if seen >= settings.plan_nodes:
                return
            seen += 1
            if self._best is not None and self._is_slower(node, source, crowded=crowded):
                continue
            found = self._look(node)
            if not isinstance(found, Option):
                missed += 1
                if missed >= _MISSED and not self._asked.aged:
                    return
            elif found.startup.queue_s <= 0.0 and not found.risk_s:
                enough += 1
                if enough >= _ENOUGH or (found.exits and found.room_s + found.delay_s <= CHEAP * found.startup.total_s):
                    return

    def _by_room(self, members: Mapping[str, object], source: Tier | None) -> Iterator[tuple[bool, str]]:
        """The nodes of a class, the roomiest first, and whether none of their devices has room as it is."""
        view, asked, fleet = self._view, self._asked, self._fleet
        count, open_nodes, looked = asked.count, fleet.open, self._looked
        need = asked.least if fleet.mixed else asked.least + asked.share
        if len(members) > _FEW:
            for room, name in view.memory.free.nodes(count, need):
                if name in members:
                    yield room < need, name
            for _, name in view.memory.loose.nodes(count, -(1 << 62)):
                if name in members:
                    yield True, name
            return
        free_on, loose_on, bandwidth_bps = view.memory.free_on, view.memory.loose_on, self._inquiry.estimates.bandwidth_bps
        least_bps = self._least_bps(source)
        channel = Channel.DEVICE if source is Tier.DRAM else Channel.DISK if source is Tier.DISK else Channel.NETWORK
        rooms: list[tuple[bool, int, str]] = []
        for name in members:
            node = open_nodes.get(name)
            if node is None or name in looked or (least_bps and bandwidth_bps(node, channel) < least_bps):
                continue
            free = free_on[name]
            if len(free) < count:
                rooms.append((True, 0, name))
                continue
            room = max(free.values()) if count == 1 else sorted(free.values())[-count]
            if room >= need:
                rooms.append((False, -room, name))
            else:
                loose = loose_on[name]
                rooms.append((True, -(max(loose.values()) if count == 1 else sorted(loose.values())[-count]), name))
        rooms.sort()
        for crowded, _, name in rooms:
            yield crowded, name

    def _least_bps(self, source: Tier | None) -> float:
        """With slower weights than that no start of a class could be better than the best so far; 0 if all could."""
        if self._best is None or source is None or source is Tier.DEVICE or self._best.key[0] <= 0.0:
            return 0.0
        if source is Tier.DRAM:
            return 0.0 if self._fleet.mixed else self._asked.share / self._best.key[0]
        return self._asked.checkpoint.image_bytes / self._best.key[0]

    def _is_slower(self, node: Node, source: Tier | None, *, crowded: bool) -> bool:
        """True if no start on a node could be better than the best so far. For a crowded node that has to be as good."""
        best, inquiry, asked = self._best, self._inquiry, self._asked
        if best is None or source is None:
            return False
        limit_s = best.key[0]
        if source is not Tier.DEVICE:
            if source is Tier.DRAM:
                assert node.inventory is not None
                size = 0 if node.inventory.devices[0].kind == "cpu" else asked.share
                channel = Channel.DEVICE
            else:
                size = asked.checkpoint.image_bytes
                channel = Channel.DISK if source is Tier.DISK else Channel.NETWORK
            if size > limit_s * inquiry.estimates.bandwidth_bps(node, channel):
                return True
        if best.exits or not (crowded or source is Tier.DEVICE):
            return False
        startup = inquiry.estimates.startup(node, asked.checkpoint, range(asked.count), source, "", asked.now)
        return startup.total_s - startup.queue_s >= limit_s

    def _look(self, node: Node) -> Option | Rejection:
        best = self._best
        found = self._spots.best_on(node, best if self._bounded else None)
        self._looked[node.id] = found
        if isinstance(found, Option) and (best is None or found.key < best.key):
            self._best = found
        return found

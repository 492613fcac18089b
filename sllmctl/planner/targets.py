"""Where a busy instance could go: ready instances of its model elsewhere, and nodes for a new one.

A ready one has room if its concurrency and its KV memory hold the victim's sequences beside its own, and beside those of the
model's instances that leave, since these come to it too. A new one starts from weights that lie on its devices, or else
from the fastest tier of its node. `_TARGETS` ready instances are considered for a victim, those with most room. Nodes for a new
one are looked at up to so many of each kind: with the weights on devices, in DRAM, with room, with room if some leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from heapq import nsmallest
from itertools import chain, islice

from schema.states import InstanceState, Tier
from sllmctl.cluster.records import LEAVING, Instance, Model, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.interface import Abilities, Journals
from sllmctl.planner.memory import step_bytes
from sllmctl.planner.packing import Packer, Start
from sllmctl.planner.rooms import Ask, Fleet, ask, ground

__all__ = ["Ready", "Targets"]

_TARGETS = 4


class Ready:
    """A ready instance with room for so many sequences and tokens more."""

    __slots__ = ("instance", "node", "room_tokens", "slots")

    def __init__(self, node: Node, instance: Instance, slots: int, room_tokens: int) -> None:
        self.node = node
        self.instance = instance
        self.slots = slots
        self.room_tokens = room_tokens


class Targets:
    """The targets as of one plan."""

    def __init__(
        self,
        view: ClusterView,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        fleet: Fleet,
        packer: Packer,
        *,
        now: float,
    ) -> None:
        self._view = view
        self._journals = journals
        self._settings = settings
        self._abilities = abilities
        self._fleet = fleet
        self._packer = packer
        self._now = now
        self._starts: dict[str, list[tuple[float, Start]]] = {}

    def ready(self, victim: Instance, model: Model, count: int, tokens: int) -> list[Ready]:
        """Those that could take so many sequences of so many tokens."""
        there = self._view.instances_of(model.name)
        if len(there) < 2:
            return []
        checkpoint = self._view.checkpoints[victim.digest]
        coming, coming_tokens = 0, 0
        for other in there.values():
            if other is not victim and (other.moving or other.state in LEAVING):
                coming += other.running
                coming_tokens += sum(self._journals.tokens(other.id))
        found: list[Ready] = []
        for other in there.values():
            node = self._fleet.open.get(other.node)
            if other is victim or other.state is not InstanceState.READY or other.moving or node is None:
                continue
            if other.digest != victim.digest:
                continue
            slots = model.spec.scale.max_concurrency - other.running - coming
            capacity = other.kv_capacity_tokens
            if not capacity:
                kv_bytes = other.working_bytes - step_bytes(model.spec, checkpoint, self._settings)
                capacity = max(0, kv_bytes) * len(other.devices) // max(1, checkpoint.kv_token_bytes)
            room_tokens = capacity - sum(self._journals.tokens(other.id)) - coming_tokens
            if slots >= count and room_tokens >= tokens:
                found.append(Ready(node, other, slots, room_tokens))
        found.sort(key=lambda one: (-one.room_tokens, one.instance.id))
        return found[:_TARGETS]

    def starts(self, model: Model) -> list[tuple[float, Start]]:
        """Ways to start an instance of a model, by how soon it would be ready; whether it has room there is not looked at."""
        found = self._starts.get(model.name)
        if found is None:
            found = []
            checkpoint = self._view.checkpoints.get(model.digest) if model.digest is not None else None
            if checkpoint is not None:
                wanted = ask(model, checkpoint, self._settings, self._now)
                for name in self._nodes(wanted):
                    found += self._starts_at(self._fleet.open[name], wanted)
            found.sort(key=lambda item: (item[0], item[1].node.id))
            self._starts[model.name] = found
        return found

    def _nodes(self, wanted: Ask) -> Iterator[str]:
        """The nodes to look at, each once: up to `_TARGETS` with its weights on devices, in DRAM, with room as it is, and with
        room if those who may leave had left."""
        view, fleet = self._view, self._fleet
        device, dram = view.nodes_with(wanted.digest, Tier.DEVICE), view.nodes_with(wanted.digest, Tier.DRAM)
        disk = view.nodes_with(wanted.digest, Tier.DISK)
        seen: set[str] = set()
        for faster in (device, dram):
            for name in islice(faster, _TARGETS):
                if name in fleet.open and name not in seen:
                    seen.add(name)
                    yield name
        members: Mapping[str, object] = fleet.open if self._abilities.fetch else disk
        need = wanted.least if fleet.mixed else wanted.least + wanted.share
        for index in (view.memory.free, view.memory.loose):
            if members is fleet.open:
                names: Iterable[str] = [name for _, name in islice(index.nodes(wanted.count, need), _TARGETS)]
            else:
                rooms = ((index.room(name, wanted.count), name) for name in members)
                fit = ((-room, name) for room, name in rooms if room is not None and room >= need)
                names = [name for _, name in nsmallest(_TARGETS, fit)]
            for name in names:
                if name in fleet.open and name not in seen:
                    seen.add(name)
                    yield name

    def _starts_at(self, node: Node, wanted: Ask) -> list[tuple[float, Start]]:
        view = self._view
        assert node.inventory is not None
        if len(node.inventory.devices) < wanted.count:
            return []
        found: list[Start] = []
        if node.id in view.nodes_with(wanted.digest, Tier.DEVICE):
            own = ground(view, node, wanted).own
            if len(own) >= wanted.count:
                found.append(Start(node, wanted, tuple(own), Tier.DEVICE, ""))
        source, peer = self._source(node, wanted.digest)
        if source is not None:
            devices = tuple(device.index for device in node.inventory.devices)
            found.append(Start(node, wanted, devices, source, peer))
        return [(self._packer.soonest_s(start), start) for start in found]

    def _source(self, node: Node, digest: str) -> tuple[Tier | None, str]:
        view = self._view
        if node.id in view.nodes_with(digest, Tier.DRAM):
            return Tier.DRAM, ""
        if node.id in view.nodes_with(digest, Tier.DISK):
            return Tier.DISK, ""
        if not self._abilities.fetch:
            return None, ""
        holders = chain(view.nodes_with(digest, Tier.DRAM), view.nodes_with(digest, Tier.DISK))
        return Tier.REMOTE, next((name for name in holders if name in self._fleet.open), "")

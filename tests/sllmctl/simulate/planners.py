"""The simplest planners that use everything the control loop and the nodes can do: the first place that is found is taken."""

from __future__ import annotations

from random import Random

from schema.link import DeviceInfo
from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.cluster.plans import Candidate, Decision, Move, Plan, Refusal, Rejection
from sllmctl.cluster.records import Instance, Model, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities, Journals, Planner
from sllmctl.simulate.policies import Policy

__all__ = ["FirstFit", "first_fit"]


class FirstFit:
    """Free room, then idle weights, then instances without work, then, as ``busy`` says, "move" or "preempt"."""

    def __init__(self, view: ClusterView, busy: str) -> None:
        self._view = view
        self._busy = busy
        self._now = 0.0

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        self._now = now
        for take in (self._free, self._idle, self._resting, self._working):
            for node in self._view.nodes.values():
                if node.state is NodeState.READY and (found := take(model, node)) is not None:
                    return Plan(found, (), {}, f"on {node.name}")
        return Refusal({Rejection.BUSY_DEVICE: len(self._view.nodes)}, False, "no room")

    def reload_s(self, model: Model, now: float) -> float:
        return 1.0

    def _free(self, model: Model, node: Node) -> Candidate | None:
        return self._on(model, node, {}, {})

    def _idle(self, model: Model, node: Node) -> Candidate | None:
        weights = {
            device.index: self._view.memory.idle_weights.get((node.id, device.index), {}) for device in self._devices(node)
        }
        digests = tuple(dict.fromkeys(digest for here in weights.values() for digest in here if digest != model.digest))
        return self._on(model, node, {index: sum(here.values()) for index, here in weights.items()}, {"drops": digests})

    def _resting(self, model: Model, node: Node) -> Candidate | None:
        return self._without(model, node, "stops", lambda one: one.idle_since is not None)

    def _working(self, model: Model, node: Node) -> Candidate | None:
        if self._busy == "preempt":
            # Two models that preempt each other at once would never come to a token.
            return self._without(model, node, "preempts", lambda one: one.running > 0 and self._now - one.ready_at > 15.0)
        if self._busy != "move":
            return None
        for victim in self._view.instances_on(node.id).values():
            if victim.state is not InstanceState.READY or not victim.running or victim.model == model.name:
                continue
            for other in self._view.nodes.values():
                owner = self._view.models[victim.model]
                target = self._on(owner, other, {}, {}) if other.id != node.id else None
                if target is None:
                    continue
                move = Move(
                    instance=victim.id,
                    node=other.id,
                    devices=target.devices,
                    working_bytes=target.working_bytes,
                    source=target.source,
                    ready_s=1.0,
                    migrate_s=1.0,
                    pause_s=0.1,
                )
                found = self._on(model, node, self._needs(victim), {"moves": (move,), "drops": (victim.digest,)})
                if found is not None:
                    return found
        return None

    def _without(self, model: Model, node: Node, how: str, may_go: object) -> Candidate | None:
        assert callable(may_go)
        for victim in self._view.instances_on(node.id).values():
            if victim.state is InstanceState.READY and victim.model != model.name and victim.served and may_go(victim):
                found = self._on(model, node, self._needs(victim), {how: (victim.id,), "drops": (victim.digest,)})
                if found is not None:
                    return found
        return None

    def _needs(self, one: Instance) -> dict[int, int]:
        return self._view.memory.device_need_bytes(one.node, one.digest, one.devices, one.working_bytes)

    def _devices(self, node: Node) -> tuple[DeviceInfo, ...]:
        return () if node.inventory is None else node.inventory.devices

    def _on(self, model: Model, node: Node, freed: dict[int, int], more: dict[str, tuple[object, ...]]) -> Candidate | None:
        """On this node, with so many bytes freed of each device."""
        assert model.digest is not None
        tiers = [
            record.tier
            for record in self._view.placements_at(model.digest, node.id).values()
            if record.state is TierState.RESIDENT and record.tier is not Tier.DEVICE
        ]
        kv_bytes = model.spec.engine.kv_bytes
        assert kv_bytes is not None
        if not tiers:
            return None
        image = self._view.checkpoints[model.digest].image_bytes
        need = kv_bytes + -(-image // model.spec.devices)
        rooms = {
            device.index: self._view.memory.free_bytes(node.id, device) + freed.get(device.index, 0)
            for device in self._devices(node)
        }
        fit = [index for index, room in sorted(rooms.items()) if room >= need]
        if len(fit) < model.spec.devices:
            return None
        return Candidate(
            node=node.id,
            name=node.name,
            devices=tuple(fit[: model.spec.devices]),
            working_bytes=kv_bytes,
            source=Tier.DRAM if Tier.DRAM in tiers else Tier.DISK,
            startup_s=1.0,
            **more,  # type: ignore[arg-type]
        )


def first_fit(busy: str = "", *, batching: bool = True, exclusive: bool = False) -> Policy:
    def make(
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        random: Random,
    ) -> Planner:
        return FirstFit(view, busy)

    return Policy(
        name=f"first fit {busy}",
        title="",
        make=make,
        abilities=Abilities(migrate=busy == "move"),
        batching=batching,
        exclusive=exclusive,
    )

"""A planner that does as it was told, and worlds for it: what the loop makes of a plan, whatever would have led to it."""

from __future__ import annotations

from collections import deque

from schema.states import InstanceState, Tier
from sllmctl.cluster.plans import Candidate, Decision, Move, Plan, Refusal, Rejection
from sllmctl.cluster.records import Instance, Model
from sllmctl.cluster.settings import ControlSettings
from tests.sllmctl.control.agents import MIB
from tests.sllmctl.control.world import Agent, World

__all__ = ["MODELS", "SETTINGS", "ScriptedPlanner", "busy_on", "end", "gpu", "lone", "manual", "move", "place", "ready"]

SETTINGS = ControlSettings(prefetch_every_s=0.0)
MODELS = ("a", "b", "c")


def place(
    node: str,
    *,
    devices: tuple[int, ...] = (0,),
    kv_mib: int = 10,
    startup_s: float = 2.0,
    room_s: float = 0.0,
    drops: tuple[str, ...] = (),
    stops: tuple[str, ...] = (),
    drains: tuple[str, ...] = (),
    moves: tuple[Move, ...] = (),
    preempts: tuple[str, ...] = (),
) -> Plan:
    best = Candidate(
        node=node, name=node, devices=devices, working_bytes=kv_mib * MIB, source=Tier.DISK, startup_s=startup_s, room_s=room_s,
        drops=drops, stops=stops, drains=drains, moves=moves, preempts=preempts,
    )  # fmt: skip
    return Plan(best, (), {}, f"on {node}, as the script says")


def move(
    instance: str,
    node: str,
    *,
    target: str = "",
    devices: tuple[int, ...] = (0,),
    kv_mib: int = 10,
    drops: tuple[str, ...] = (),
) -> Move:
    return Move(
        instance=instance, node=node, devices=devices, working_bytes=kv_mib * MIB, target=target, drops=drops,
        ready_s=1.0, migrate_s=1.0, pause_s=0.1,
    )  # fmt: skip


class ScriptedPlanner:
    """``script`` by model; without more of it there is no room now. ``asked``: for whom it was asked, and when."""

    def __init__(self) -> None:
        self.script: dict[str, deque[Decision]] = {}
        self.asked: list[tuple[str, float]] = []
        self.reloads_s = 1.0

    def then(self, model: str, *decisions: Decision) -> None:
        self.script.setdefault(model, deque()).extend(decisions)

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        self.asked.append((model.name, now))
        left = self.script.get(model.name)
        if left:
            return left.popleft()
        return Refusal({Rejection.BUSY_DEVICE: 1}, False, f"the script has no place for {model.name}")

    def reload_s(self, model: Model, now: float) -> float:
        return self.reloads_s


def gpu(name: str, *, device_mib: int = 25, devices: int = 1, arena_mib: int = 1000) -> Agent:
    """Room for one instance of 10 MiB of KV cache and 8 of weights, and a little."""
    agent = Agent(name, kind="cuda", device_mib=device_mib, devices=devices, arena_mib=arena_mib)
    for model in MODELS:
        agent.hold(model)
    return agent


def busy_on(world: World, planner: ScriptedPlanner, model: str, node: str, running: int = 1) -> Instance:
    planner.then(model, place(node))
    return world.served(model, running)


def manual(world: World) -> None:
    for agent in world.agents.values():
        agent.automatic = False


def end(world: World, instance: Instance) -> None:
    """What drains or stops has ended."""
    world.tell(instance.node, world.agents[instance.node].become(instance.id, InstanceState.STOPPED))


def ready(world: World, instance: Instance) -> None:
    world.tell(instance.node, world.agents[instance.node].become(instance.id, InstanceState.READY))


def lone(world: World, model: str, *states: InstanceState) -> Instance:
    (found,) = [one for one in world.view.instances_of(model).values() if one.state in states]
    return found

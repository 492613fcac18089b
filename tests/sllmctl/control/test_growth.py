"""What comes and goes for weeks leaves nothing behind: whatever holds things is as large after many models as after a few."""

from __future__ import annotations

from collections import deque
from random import Random

from msgspec import Struct

from schema.errors import Fault
from schema.link import DropCheckpoint, StartPhases
from schema.states import InstanceState, Tier
from sllmctl.cluster.settings import ControlSettings
from sllmctl.control.events import AddModel, RemoveModel
from tests.examples import examples
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState
BOUNDED = {"decisions._made", "_core.estimates._windows", "_core.estimates._unreported"}
"""What a setting bounds, and what was learned of a checkpoint, which it is to find again when it comes back."""


def sizes(owner: object, path: str = "", seen: set[int] | None = None) -> dict[str, int]:
    """How many there are in each container that an object holds, or an object of ours that it holds."""
    seen = set() if seen is None else seen
    seen.add(id(owner))
    found: dict[str, int] = {}
    for name in getattr(owner, "__slots__", None) or vars(owner):
        value, where = getattr(owner, name), f"{path}.{name}".lstrip(".")
        if where in BOUNDED:
            continue
        if isinstance(value, dict | list | set | deque):
            inner = value.values() if isinstance(value, dict) else ()
            found[where] = len(value) + sum(len(one) for one in inner if isinstance(one, dict | list | set))
        elif type(value).__module__.startswith("sllmctl") and not isinstance(value, Struct) and id(value) not in seen:
            found |= sizes(value, where, seen)
    return found


def live_and_go(world: World, name: str, random: Random) -> None:
    """A model comes, is served by one that may crash, and goes; its node may be away meanwhile, or not let go of it."""
    node = random.choice(sorted(world.agents))
    agent = world.agents[node]
    assert world.ask(lambda ticket: AddModel(ticket, spec(name, node=node, keep_alive_s=1.0), True)) is None
    world.demand(name, 1)
    instance = world.only(name)
    world.busy(instance, 1)
    if random.random() < 0.3:
        world.crash(instance)
    world.demand(name, 0)
    if instance.id in world.view.instances:
        world.busy(instance, 0)
    agent.phases = None if random.random() < 0.3 else StartPhases(load_s=1.0, loaded_from=Tier.DISK, total_s=2.0)
    if random.random() < 0.3:
        world.lose(node)
        world.pass_time(2.0)
        world.connect(node)
    agent.automatic = random.random() < 0.5
    world.ask(lambda ticket: RemoveModel(ticket, name))
    for id_, life in list(agent.lives.items()):
        if life.state is _I.DRAINING:
            world.tell(node, agent.become(id_, _I.STOPPED))
    for op, asked in list(agent.ops.items()):
        if isinstance(asked, DropCheckpoint) and asked.tier is Tier.DEVICE:
            world.tell(node, agent.finish(op, Fault("internal", "the device does not answer")))
    agent.automatic = True
    for op in list(agent.ops):
        world.tell(node, agent.finish(op))
    for other in world.agents.values():
        other.forget()
        other.checkpoints.pop(digest_of(name), None)
        world.connect(other.name)
    world.pass_time(world.settings.unreachable_grace_s + world.settings.room_timeout_s)
    assert name not in world.view.models


def test_what_is_gone_is_gone(make_world: MakeWorld) -> None:
    seed = Random().randrange(1 << 32)
    print(f"seed {seed}")
    random = Random(seed)
    agents = [Agent("a", kind="cuda", devices=2), Agent("b", kind="cuda")]
    world = make_world(*agents, settings=ControlSettings(prefetch_every_s=1000.0, drop_retry_s=1.0))
    for agent in agents:
        world.connect(agent.name)
    for number in range(10):
        live_and_go(world, f"few{number}", random)
    few = sizes(world.loop)
    many = 10 + examples(80)
    for number in range(10, many):
        live_and_go(world, f"many{number}", random)
    world.check_rows()
    grown = {where: (few[where], size) for where, size in sizes(world.loop).items() if size > few[where] + 6}
    assert not grown, f"sizes after 10 models, and after {many}"
    assert few["view.placements"] == 0
    assert any(where.startswith("_core.estimates._loads") for where in few)

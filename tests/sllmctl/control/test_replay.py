"""The same events at the same times give the same effects, and a step is cheap."""

from __future__ import annotations

from sllmctl.control.events import AddModel, DeployModel, InstanceActivity, RemoveModel
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, spec


def _play(world: World) -> None:
    world.connect("a")
    world.connect("b")
    world.ask(lambda ticket: AddModel(ticket, spec("m", least=1, most=2, node="a")))
    world.agents["b"].hold("m")
    world.lose("b")
    world.connect("b")
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    world.demand("m", 9)
    world.pass_time(5.0)
    for instance in list(world.view.instances.values()):
        world.do(InstanceActivity(instance.id, 1))
        world.crash(instance)
        world.crash(instance)
    world.pass_time(200.0)
    world.lose("a")
    world.pass_time(500.0)
    world.start_manager()
    world.connect("a")
    world.ask(lambda ticket: RemoveModel(ticket, "m"))


def test_equal_histories_have_equal_effects(make_world: MakeWorld) -> None:
    first, second = make_world(Agent("a"), Agent("b")), make_world(Agent("a"), Agent("b"))
    _play(first)
    _play(second)
    assert len(first.history) > 30
    assert first.history == second.history

"""Pins: kept over restarts, told to nodes, and never a victim."""

from __future__ import annotations

from typing import Any

from schema.errors import Fault
from schema.link import DropCheckpoint, Placement, PlacementUpdate, SetPins
from schema.states import InstanceState, Tier, TierState
from sllmctl.control.events import FromNode, Operate, Pin, RemoveModel
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import MIB, Agent, World, digest_of, spec

M = digest_of("m")


def pin(
    world: World, reference: str, node: str | None = None, tier: Tier | None = None, *, pinned: bool = True
) -> Fault | None:
    return world.ask(lambda ticket: Pin(ticket, reference, node, tier, pinned))


def test_a_pin_is_where_it_lies_and_is_told_to_the_node(make_world: MakeWorld) -> None:
    agents = Agent("local"), Agent("far")
    for agent in agents:
        agent.hold("m", dram=agent.name == "far")
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    assert pin(world, M) is None
    assert set(world.view.pins) == {(M, "local", Tier.DISK), (M, "far", Tier.DISK), (M, "far", Tier.DRAM)}
    assert agents[0].pins == {(M, Tier.DISK)}
    assert agents[1].pins == {(M, Tier.DISK), (M, Tier.DRAM)}
    world.check_rows()
    assert pin(world, M, "far", pinned=False) is None
    assert agents[1].pins == set()
    assert set(world.view.pins) == {(M, "local", Tier.DISK)}
    assert world.reasons("checkpoint") == ["Pinned"] * 3 + ["Unpinned"] * 2
    world.check_rows()


def test_pins_outlast_the_manager_the_link_and_the_agent(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m")
    world.connect("local")
    assert pin(world, M, "local", Tier.DRAM) is None
    world.start_manager()
    agent.pins = set()
    world.connect("local")
    assert agent.pins == {(M, Tier.DRAM)}
    assert set(world.view.pins) == {(M, "local", Tier.DRAM)}
    world.check_rows()


def test_asking_twice_is_asking_once(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m")
    world.connect("local")
    for _ in range(2):
        assert pin(world, M) is None
    for _ in range(2):
        assert pin(world, M, pinned=False) is None
    assert world.reasons("checkpoint") == ["Pinned", "Unpinned"]
    assert world.view.pins == {}
    assert [len(one.pins) for one in agent.heard if isinstance(one, SetPins)] == [0, 0, 1, 0]


def test_what_cannot_be_pinned_is_said(make_world: MakeWorld) -> None:
    agent = Agent("local", arena_mib=10)
    for name in ("a", "b"):
        agent.hold(name, image_mib=8)
    world = make_world(agent, Agent("far"))
    world.connect("local")
    world.connect("far")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("ffff",), "not_found"),
        ((digest_of("a"), "nowhere"), "not_found"),
        ((digest_of("a"), "far"), "not_found"),
        ((digest_of("a"), None, Tier.DRAM), "not_found"),
        ((digest_of("a"), None, Tier.DEVICE), "invalid_input"),
    ]
    for arguments, code in cases:
        fault = pin(world, *arguments)
        assert fault is not None
        assert fault.code == code, arguments
    assert pin(world, digest_of("a"), "local", Tier.DRAM) is None
    fault = pin(world, digest_of("b"), "local", Tier.DRAM)
    assert fault is not None
    assert "do not fit beside" in fault.message
    assert set(world.view.pins) == {(digest_of("a"), "local", Tier.DRAM)}


def test_a_pinned_copy_is_not_removed_by_command_nor_with_its_model(world: World) -> None:
    world.serve(spec())
    assert pin(world, "m", tier=Tier.DISK) is None
    fault = world.ask(lambda ticket: Operate(ticket, "drop", "m", None, None))
    assert fault is not None
    assert "unpin it first" in fault.message
    assert world.ask(lambda ticket: RemoveModel(ticket, "m")) is None
    assert not any(isinstance(one, DropCheckpoint) and one.tier is Tier.DISK for one in world.agents["local"].heard)
    assert M in world.view.checkpoints
    assert "Kept" in world.reasons("checkpoint")
    assert pin(world, M, pinned=False) is None
    assert world.ask(lambda ticket: Operate(ticket, "drop", M, None, None)) is None
    assert M not in world.view.checkpoints
    world.check_rows()


def test_the_planner_makes_no_room_of_what_is_pinned_in_memory(make_world: MakeWorld) -> None:
    agent = Agent("local", arena_mib=20, device_mib=100)
    for name, size in (("a", 12), ("b", 12)):
        agent.hold(name, image_mib=size, dram=name == "a")
    world = make_world(agent)
    world.connect("local")
    assert pin(world, digest_of("a"), "local", Tier.DRAM) is None
    world.serve(spec("b"))
    world.demand("b", 1)
    assert not world.view.instances_of("b")
    assert world.view.models["b"].refusal
    world.check_rows()
    assert pin(world, digest_of("a"), pinned=False) is None
    assert world.only("b").state is InstanceState.READY
    world.check_rows()


def test_the_pin_of_an_instance_that_leaves_gives_no_room(make_world: MakeWorld) -> None:
    agent = Agent("local", arena_mib=20, device_mib=100)
    for name in ("a", "b"):
        agent.hold(name, image_mib=12, dram=name == "a")
    world = make_world(agent)
    world.connect("local")
    world.serve(spec("a", keep_alive_s=1e6))
    world.served("a")
    assert pin(world, digest_of("a"), "local", Tier.DRAM) is None
    world.serve(spec("b"))
    world.demand("b", 1)
    world.pass_time(500)
    assert not world.view.instances_of("b")
    assert world.only("a").state is InstanceState.READY
    world.check_rows()


def test_a_pin_ahead_of_its_copy_counts_once_it_is_there(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m", image_mib=8)
    world.connect("local")
    assert pin(world, M, "local", Tier.DRAM) is None
    assert world.view.memory.arena_held_bytes.get("local", 0) == 0
    there = Placement(tier=Tier.DRAM, state=TierState.RESIDENT, size_bytes=8 * MIB)
    truth = agent.checkpoints[M]
    before = truth.placements
    for placements, held in (((*before, there), 8 * MIB), (before, 0)):
        agent.checkpoints[M] = truth.__class__(
            digest=M,
            architecture="Tiny",
            image_bytes=8 * MIB,
            kv_token_bytes=1024,
            max_context_tokens=512,
            placements=placements,
        )
        world.do(FromNode("local", PlacementUpdate(truth=agent.checkpoints[M])))
        assert world.view.memory.arena_held_bytes.get("local", 0) == held
        world.check_rows()

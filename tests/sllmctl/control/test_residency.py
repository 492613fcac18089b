"""What nodes say has happened to memory and devices: kept as events, with names that an operator knows, and not without end."""

from __future__ import annotations

from schema.link import NodeEvent
from sllmctl.control.effects import Log
from sllmctl.control.events import FromNode
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, digest_of, spec

M, OTHER = digest_of("m"), digest_of("other")


def connected(make_world: MakeWorld) -> World:
    agent = Agent("local")
    agent.hold("m")
    world = make_world(agent)
    world.connect("local")
    world.serve(spec())
    return world


def says(world: World, said: NodeEvent) -> None:
    world.say(FromNode("local", said))


def test_an_eviction_is_an_event_of_its_checkpoint_that_says_for_whom(make_world: MakeWorld) -> None:
    world = connected(make_world)
    told = NodeEvent(reason="Evicted", message="from memory, 5 bytes: to make room", digest=OTHER, for_digest=M)
    says(world, told)
    event = world.events[-1]
    assert (event.kind, event.object, event.reason, event.level) == ("checkpoint", OTHER, "Evicted", "info")
    assert event.message == f"on node local: from memory, 5 bytes: to make room for checkpoint {M[:12]} (m)"


def test_what_happens_to_the_store_is_an_event_of_its_node(make_world: MakeWorld) -> None:
    world = connected(make_world)
    says(world, NodeEvent(reason="StoreLost", message="the store is lost (why)", level="warning", ago_s=35.2))
    event = world.events[-1]
    assert (event.kind, event.object, event.reason, event.level) == ("node", "local", "StoreLost", "warning")
    assert event.message == "the store is lost (why); it was 35 s ago, while no manager was there"


def test_of_a_thrashing_node_a_few_events_are_written_and_the_others_counted(make_world: MakeWorld) -> None:
    world = connected(make_world)
    told = NodeEvent(reason="Evicted", message="from memory: to make room", digest=OTHER, for_digest=M)
    before = len(world.events)
    for _ in range(100):
        says(world, told)
    written = [one for one in world.events[before:] if one.reason == "Evicted"]
    assert len(written) == 20
    logged = [e for _, _, step in world.history for e in step.effects if isinstance(e, Log) and ": Evicted: " in e.message]
    assert len(logged) == 100, "all of it is in the log"
    says(world, NodeEvent(reason="StoreLost", message="the store is lost", level="warning"))
    assert world.events[-1].reason == "StoreLost", "what is rare is not lost among what is frequent"
    world.pass_time(10.0)
    says(world, told)
    assert world.events[-1].message.endswith("; 80 like it before were only logged")
    says(world, told)
    assert world.events[-1].message.endswith("; 80 like it before were only logged"), "the next one waits"
    world.pass_time(3600.0)
    before = len(world.events)
    for _ in range(100):
        says(world, told)
    written = [one for one in world.events[before:] if one.reason == "Evicted"]
    assert len(written) == 20
    assert written[0].message.endswith("; 1 like it before were only logged")

"""How many instances: from zero, up, down, to zero; and what becomes of those for whom there is no place."""

from __future__ import annotations

import pytest

from schema.link import StopInstance
from schema.spec import ScaleSpec
from schema.states import InstanceState
from sllmctl.control.events import AddModel, AddNode, Close, DeployModel, NodeLost
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, spec

_I = InstanceState


def test_keep_alive_runs_from_the_end_of_the_last_request(world: World) -> None:
    world.serve(spec(keep_alive_s=100.0))
    world.demand("m", 1)
    instance = world.only()
    world.demand("m", 0, 1)
    world.busy(instance, 1)
    world.pass_time(500.0)
    assert world.only() is instance
    world.busy(instance, 0)
    world.pass_time(60.0)
    world.busy(instance, 1)
    world.busy(instance, 0)
    world.pass_time(99.0)
    assert world.only() is instance
    world.pass_time(1.0)
    assert not world.view.instances
    assert "ScaledToZero" in world.reasons("instance")
    stop = world.agents["local"].heard[-1]
    assert isinstance(stop, StopInstance)
    assert stop.grace_s == world.settings.drain_s


def test_min_is_started_at_once_and_kept(world: World) -> None:
    world.serve(spec(least=2, most=2, keep_alive_s=10.0))
    assert len(world.view.instances) == 2
    world.pass_time(100.0)
    assert len(world.view.instances) == 2


def test_a_manager_that_ends_begins_nothing_any_more(world: World) -> None:
    world.serve(spec(least=1, most=2))
    instance = world.only()
    world.do(Close())
    world.crash(instance)
    assert not world.view.instances
    assert not {"Scheduled", "BackOff"} & set(world.reasons("instance")[1:])
    world.demand("m", 3)
    world.pass_time(100.0)
    assert not world.view.instances


def test_more_are_started_only_when_waiting_persists(world: World) -> None:
    world.serve(spec(most=2))
    world.demand("m", 1)
    world.demand("m", 0, 4)
    world.busy(world.only(), 4)
    world.demand("m", 3, 4)
    assert len(world.view.instances) == 1
    world.pass_time(world.settings.scale_up_after_s)
    assert len(world.view.instances) == 2
    world.demand("m", 30, 8)
    world.pass_time(10.0)
    assert len(world.view.instances) == 2


def test_a_brief_wait_starts_nothing(world: World) -> None:
    world.serve(spec(most=2))
    world.demand("m", 1)
    world.demand("m", 0, 4)
    world.demand("m", 1, 4)
    world.pass_time(world.settings.scale_up_after_s / 2)
    world.demand("m", 0, 4)
    world.pass_time(50.0)
    assert len(world.view.instances) == 1


def test_from_zero_as_many_as_the_queue_needs(world: World) -> None:
    world.agents["local"].automatic = False
    world.agents["local"].hold("m")
    world.lose("local")
    world.connect("local")
    world.ask(lambda ticket: AddModel(ticket, spec(most=4)))
    world.tell("local", world.agents["local"].finish(next(iter(world.agents["local"].ops))))
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    world.demand("m", 4)
    assert len(world.view.instances) == 1
    world.demand("m", 5)
    assert len(world.view.instances) == 2
    world.demand("m", 6)
    assert len(world.view.instances) == 2


def test_a_lower_max_stops_the_least_useful(world: World) -> None:
    world.serve(spec(least=2, most=2))
    busy, idle = world.view.instances.values()
    world.busy(busy, 2)
    world.ask(lambda ticket: DeployModel(ticket, "m", ScaleSpec(min=0, max=1, max_concurrency=9)))
    assert list(world.view.instances) == [busy.id]
    assert idle.id not in world.agents["local"].lives
    assert world.routes[busy.id].max_concurrency == 9


def test_what_no_node_can_ever_hold_is_refused_with_the_reason(world: World) -> None:
    world.serve(spec(kv_mib=1000))
    world.demand("m", 2)
    (refused,) = world.rejected
    assert refused.fault.code == "unschedulable"
    assert "1 node with too little device memory in all" in refused.fault.message
    world.demand("m", 0)
    model = world.view.models["m"]
    assert (model.refusal, model.no_place) == ("", refused.fault.message), "nobody waits for it, and still it can be told"
    world.demand("m", 1)
    assert len(world.rejected) == 2
    assert world.reasons("model").count("Unschedulable") == 2


def test_what_has_no_room_now_waits_and_starts_when_there_is(world: World) -> None:
    for name in ("a", "b", "c"):
        world.serve(spec(name, keep_alive_s=50.0))
    world.demand("a", 1)
    world.demand("b", 1)
    world.demand("a", 0)
    world.demand("b", 0)
    world.demand("c", 1)
    assert not world.view.instances_of("c")
    assert world.rejected == []
    assert world.view.models["c"].refusal == "no node has room for model 'c' now: 1 node with its device memory in use"
    assert world.view.models["c"].no_place == "", "it waits for room, and is refused for nothing else"
    world.pass_time(50.0)
    assert world.only("c").state is _I.READY
    assert (world.view.models["c"].refusal, world.view.models["c"].no_place) == ("", "")


def test_those_who_wait_longest_get_the_room_first(world: World) -> None:
    for name in ("a", "z", "b"):
        world.serve(spec(name, kv_mib=20))
    world.demand("a", 1)
    world.busy(world.only("a"), 1)
    world.demand("a", 0, 1)
    world.pass_time(1.0)
    world.demand("z", 1)
    world.pass_time(1.0)
    world.demand("b", 1)
    world.busy(world.only("a"), 0)
    world.demand("a", 0)
    world.pass_time(101.0)
    assert world.only("z").state is _I.READY
    assert not world.view.instances_of("b")


def test_an_unreachable_node_that_holds_it_means_wait(world: World) -> None:
    world.serve(spec())
    world.lose("local")
    world.demand("m", 1)
    world.pass_time(1000.0)
    assert world.rejected == []
    world.connect("local")
    assert world.only().state is _I.READY


def test_a_joining_node_that_lacks_it_does_not(make_world: MakeWorld) -> None:
    world = make_world(Agent("local", device_mib=5), Agent("new"))
    world.connect("local")
    world.serve(spec())
    world.do(AddNode("new", "new", "unix:/run/new"))
    world.demand("m", 1)
    assert "1 node without the checkpoint" in world.rejected[-1].fault.message


def test_a_node_whose_address_is_another_now_is_dialled_there(world: World) -> None:
    world.do(AddNode("local", "local", "unix:/run/elsewhere"))
    assert world.view.nodes["local"].address == "unix:/run/elsewhere"
    assert world.reasons("node").count("Moved") == 1
    world.do(AddNode("local", "local", "unix:/run/elsewhere"))
    assert world.reasons("node").count("Moved") == 1
    world.start_manager()
    assert world.view.nodes["local"].address == "unix:/run/elsewhere", "it is written down"


def test_a_restarted_manager_starts_what_is_missing(world: World) -> None:
    world.serve(spec(least=1))
    world.agents["local"].lives.clear()
    world.start_manager()
    assert world.reasons("model").count("Unschedulable") == 0
    world.connect("local")
    assert world.only().state is _I.READY


def unplaced(world: World) -> list[str]:
    """What was said of models without a place."""
    return [one.message for one in world.events if one.reason == "Unschedulable"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_restarted_manager_complains_of_no_node_that_is_about_to_link(make_world: MakeWorld, stopped: bool) -> None:
    world = make_world(Agent("local"), Agent("far"))
    world.connect("local")
    world.connect("far")
    world.serve(spec("near", node="local"))
    world.serve(spec("m", least=int(stopped), node="far"))
    if stopped:
        world.do(Close())
        world.crash(world.only("m"))
        for node in world.agents:
            world.agents[node].connected = False
            world.do(NodeLost(node, "", stopped=True))
    world.start_manager()
    world.demand("near", 1)
    world.connect("local")
    if not stopped:
        world.demand("m", 1)
    assert "unreachable" in world.view.models["m"].refusal, "it can be asked for"
    assert unplaced(world) == []
    world.connect("far")
    assert (world.only("m").state, world.only("near").state) == (_I.READY, _I.READY)
    world.pass_time(world.settings.unreachable_grace_s)
    assert unplaced(world) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_node_that_stays_away_is_complained_of_after_its_grace(make_world: MakeWorld, restarted: bool) -> None:
    world = make_world(Agent("local"), Agent("far"))
    world.connect("local")
    world.connect("far")
    names = [f"m{number}" for number in range(9)]
    for name in names:
        world.serve(spec(name, node="far"))
    if restarted:
        world.start_manager()
        world.connect("local")
    else:
        world.lose("far")
    for name in names:
        world.demand(name, 1)
    world.pass_time(world.settings.unreachable_grace_s / 2)
    assert unplaced(world) == []
    world.pass_time(world.settings.unreachable_grace_s)
    assert sorted(message.split("'")[1] for message in unplaced(world)) == names
    assert all("unreachable" in message for message in unplaced(world))
    world.pass_time(world.settings.unreachable_grace_s * 3)
    assert len(unplaced(world)) == len(names)
    world.demand("m0", 0)
    world.demand("m0", 1)
    assert len(unplaced(world)) == len(names) + 1


def test_a_link_that_breaks_for_a_moment_repeats_no_complaint(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("far"))
    world.agents["far"].hold("m")
    world.connect("local")
    world.connect("far")
    for node in world.agents:
        world.serve(spec(f"of-{node}", least=2, most=2, node=node))
    world.serve(spec("m", least=1, node="local"))
    (said,) = unplaced(world)
    assert "with its device memory in use" in said
    world.lose("far")
    world.demand("m", 1)
    assert "unreachable" in world.view.models["m"].refusal
    world.connect("far")
    world.pass_time(world.settings.unreachable_grace_s)
    assert unplaced(world) == [said]


def two_idle_and_one_waiting(world: World, **rule: int) -> None:
    """Models a and b have an idle instance each, which fill the node; a request waits for c."""
    for name in "abc":
        world.serve(spec(name, **(rule if name == "a" else {})))
    for name in "ab":
        world.demand(name, 1)
        world.demand(name, 0, 1)
        world.busy(world.only(name), 1)
        world.demand(name, 0)
        world.busy(world.only(name), 0)
        world.pass_time(0.25)
    world.demand("c", 1)


def test_the_longest_idle_gives_its_place_to_one_that_waits(world: World) -> None:
    two_idle_and_one_waiting(world)
    assert {one.model for one in world.view.instances.values()} == {"a", "b"}, "not at once: they have only just served"
    world.pass_time(world.settings.evict_idle_s + world.settings.evict_look_s)
    assert {one.model for one in world.view.instances.values()} == {"b", "c"}
    assert "Evicted" in world.reasons("instance")
    assert world.only("c").state is _I.READY


def test_the_busy_and_the_minimum_keep_their_place(world: World) -> None:
    two_idle_and_one_waiting(world, least=1)
    world.busy(world.only("b"), 1)
    world.pass_time(world.settings.age_s - 1.0)
    assert {one.model for one in world.view.instances.values()} == {"a", "b"}
    world.busy(world.only("b"), 0)
    world.pass_time(world.settings.evict_idle_s + world.settings.evict_look_s)
    assert {one.model for one in world.view.instances.values()} == {"a", "c"}


def test_the_word_from_before_an_instance_was_ready_starts_no_other(world: World) -> None:
    world.agents["local"].hold("m")
    world.serve(spec(most=2))
    world.agents["local"].automatic = False
    world.demand("m", 1)
    world.pass_time(10.0)
    world.tell("local", world.agents["local"].become(world.only().id, _I.READY))
    assert len(world.view.instances) == 1
    world.demand("m", 0, 1)
    world.pass_time(10.0)
    assert len(world.view.instances) == 1


def test_those_who_still_wait_then_get_another(world: World) -> None:
    world.serve(spec(most=2))
    world.agents["local"].automatic = False
    world.demand("m", 4)
    world.pass_time(10.0)
    world.tell("local", world.agents["local"].become(world.only().id, _I.READY))
    world.demand("m", 1, 4)
    assert len(world.view.instances) == 1
    world.pass_time(world.settings.scale_up_after_s)
    assert len(world.view.instances) == 2

"""Moves carried out: a target first, then the sequences, then the room; and what is lost on the way."""

from __future__ import annotations

import pytest

from schema.states import InstanceState
from sllmctl.cluster.records import Instance
from sllmctl.control.events import InstanceActivity, StopModel
from tests.sllmctl.control.scripted import SETTINGS, ScriptedPlanner, busy_on, end, gpu, lone, manual, move, place, ready
from tests.sllmctl.control.world import World, digest_of

_I = InstanceState


def moving(scripted, *, made: bool = True, most: int = 1) -> tuple[World, ScriptedPlanner, Instance, Instance]:
    """a runs on n1 and is to go to n2, for b, which is planned on n1."""
    world, planner = scripted(gpu("n1"), gpu("n2"), gpu("n3"), most=most)
    source = busy_on(world, planner, "a", "n1", 2)
    manual(world)
    target = ""
    planner.then("b", place("n1", moves=(move(source.id, "n2", target=target),), drops=(digest_of("a"),)))
    world.demand("b", 1)
    return world, planner, source, lone(world, "b", _I.PLANNED)


def test_a_move_goes_by_target_then_sequences_then_room(scripted) -> None:
    world, _, source, cause = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    assert (target.node, source.state, source.moving) == ("n2", _I.READY, True)
    assert world.routes[source.id].state is _I.READY
    ready(world, target)
    assert [(one.source, one.target) for one in world.migrated] == [(source.id, target.id)]
    assert target.running == 2
    assert source.id not in world.view.instances
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert cause.state is _I.STARTING
    assert world.only("a") is target
    assert world.loop._core.moves == {}
    world.check_rows()


def test_a_move_to_a_ready_instance_begins_at_once(scripted) -> None:
    world, planner = scripted(gpu("n1"), gpu("n2"), most=2)
    source = busy_on(world, planner, "a", "n1", 4)
    planner.then("a", place("n2"))
    world.demand("a", 1, 4)
    world.pass_time(SETTINGS.scale_up_after_s)
    target = next(one for one in world.view.instances_of("a").values() if one is not source)
    world.demand("a", 0, 4)
    planner.then("b", place("n1", moves=(move(source.id, "n2", target=target.id),), drops=(digest_of("a"),)))
    world.demand("b", 1)
    assert lone(world, "b", _I.READY).node == "n1"
    assert target.running == 4
    assert world.only("a") is target


def test_a_max_is_exceeded_for_no_longer_than_the_move(scripted) -> None:
    world, _, source, _ = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    world.demand("a", 5, 2)
    world.pass_time(60.0)
    assert set(world.view.instances_of("a")) == {source.id, target.id}
    world.demand("a", 0, 2)
    world.demand("b", 0)
    assert world.only("a") is source
    assert not source.moving


def test_a_lost_target_gives_the_newcomer_up_which_is_planned_anew(scripted) -> None:
    world, planner, source, cause = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    planner.then("b", place("n3"))
    world.crash(target)
    assert cause.id not in world.view.instances
    assert target.id not in world.view.instances
    assert (source.state, source.moving) == (_I.READY, False)
    world.pass_time(SETTINGS.evict_look_s)
    assert lone(world, "b", _I.STARTING).node == "n3"
    assert world.reasons("instance").count("RoomLost") == 1


def test_a_target_on_a_node_that_stays_away_is_lost(scripted) -> None:
    world, planner, source, cause = moving(scripted)
    world.lose("n2")
    planner.then("b", place("n3"))
    world.pass_time(SETTINGS.unreachable_grace_s + 1.0)
    assert cause.id not in world.view.instances
    assert lone(world, "b", _I.STARTING).node == "n3"
    assert world.only("a") is source


@pytest.mark.parametrize("running", [0, 2])
def test_a_source_that_dies_leaves_its_room_and_the_target_if_it_is_needed(scripted, running: int) -> None:
    world, _, source, cause = moving(scripted, most=2)
    target = lone(world, "a", _I.STARTING)
    world.demand("a", 0, running)
    world.crash(source)
    assert source.id not in world.view.instances, "its target takes its place"
    assert (target.id in world.view.instances) == bool(running)
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert cause.state is _I.STARTING


def test_a_source_that_has_nothing_left_to_do_goes_at_once(scripted) -> None:
    world, _, source, cause = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    world.demand("a", 0, 0)
    world.busy(source, 0)
    assert source.state is _I.DRAINING
    assert target.id not in world.view.instances
    end(world, source)
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert cause.state is _I.STARTING
    assert world.migrated == []


def test_a_target_for_which_the_newcomer_does_not_wait_any_more_is_not_started_in_vain(scripted) -> None:
    world, _, source, _ = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    world.demand("b", 0)
    assert target.id not in world.view.instances
    assert (source.state, source.moving) == (_I.READY, False)


def test_a_target_that_would_not_be_needed_is_kept_while_it_moves(scripted) -> None:
    """A planned target is for a source, whether or not anyone waits for its model."""
    world, planner = scripted(gpu("n1"), gpu("n2"))
    source = busy_on(world, planner, "a", "n1", 2)
    there = busy_on(world, planner, "c", "n2", 0)
    world.ask(lambda ticket: StopModel(ticket, "c"))
    assert there.id not in world.view.instances
    manual(world)
    planner.then("b", place("n1", moves=(move(source.id, "n2", kv_mib=17, drops=(digest_of("c"),)),)))
    world.demand("b", 1)
    target = lone(world, "a", _I.PLANNED)
    world.demand("a", 0, 2)
    world.pass_time(5.0)
    assert target.state is _I.PLANNED
    world.tell("n2", world.agents["n2"].finish(next(iter(world.agents["n2"].ops))))
    assert target.state is _I.STARTING


def test_two_moves_for_one_newcomer_and_one_of_them_fails(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=40), gpu("n2"), gpu("n3"))
    one, other = (busy_on(world, planner, model, "n1", 2) for model in "ac")
    manual(world)
    planner.then("b", place("n1", kv_mib=30, moves=(move(one.id, "n2"), move(other.id, "n3"))))
    world.demand("b", 1)
    first, second = lone(world, "a", _I.STARTING), lone(world, "c", _I.STARTING)
    world.crash(first)
    assert not world.view.instances_of("b")
    assert second.id not in world.view.instances
    assert (one.state, other.state) == (_I.READY, _I.READY)
    assert not one.moving
    assert not other.moving
    assert world.loop._core.moves == {}
    assert world.loop._core._moves_of == {}


def test_after_a_restart_a_move_that_nobody_remembers_is_given_up_soon(scripted) -> None:
    world, planner, source, cause = moving(scripted)
    target = lone(world, "a", _I.STARTING)
    world.start_manager()
    world.demand("b", 1)
    world.demand("a", 0, 2)
    planner.then("b", place("n3"))
    for node in ("n1", "n2", "n3"):
        world.connect(node)
    world.do(InstanceActivity(source.id, 2))
    world.pass_time(SETTINGS.evict_look_s)
    assert cause.id not in world.view.instances
    assert lone(world, "b", _I.STARTING).node == "n3"
    assert target.id not in world.view.instances
    assert world.only("a").id == source.id
    world.check_rows()

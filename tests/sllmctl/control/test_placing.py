"""Plans carried out: room reserved first, victims told, weights dropped, newcomers begun when their room is there, or not."""

from __future__ import annotations

import pytest

from schema.errors import Fault
from schema.link import DropCheckpoint, OperationDone, StartInstance, StopInstance
from schema.states import InstanceState, Tier, TierState
from sllmctl.cluster.records import Instance
from sllmctl.control.effects import Send
from sllmctl.control.events import DemandChanged, DeployModel, FromNode, StopModel
from tests.sllmctl.control.scripted import SETTINGS, ScriptedPlanner, busy_on, end, gpu, lone, manual, place, ready
from tests.sllmctl.control.world import World, digest_of

_I = InstanceState


# --- reserved, then begun ---


def test_a_drain_is_asked_for_with_the_place_reserved_and_the_newcomer_begins_after_it(scripted) -> None:
    world, planner = scripted(gpu("n1"))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", drains=(victim.id,), drops=(digest_of("a"),), room_s=5.0))
    world.demand("b", 1)
    newcomer = lone(world, "b", _I.PLANNED)
    assert victim.state is _I.DRAINING
    assert world.view.memory.committed_bytes["n1", 0] == 36 << 20
    stop = [one for one in world.agents["n1"].heard if isinstance(one, StopInstance)][-1]
    assert stop.grace_s == SETTINGS.drain_longest_s
    world.pass_time(30.0)
    assert newcomer.state is _I.PLANNED
    assert newcomer.epoch == 0
    before = len(world.agents["n1"].heard)
    end(world, victim)
    assert newcomer.state is _I.PLANNED, "the weights of the one that left are in its way"
    (op,) = world.agents["n1"].ops
    world.tell("n1", world.agents["n1"].finish(op))
    assert newcomer.state is _I.STARTING
    said = [type(one) for one in world.agents["n1"].heard[before:] if isinstance(one, DropCheckpoint | StartInstance)]
    assert said == [DropCheckpoint, StartInstance]
    ready(world, newcomer)
    assert newcomer.expected_s == 0.0
    world.check_rows()


def test_weights_of_a_victim_stay_where_there_is_room_for_both(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=40))
    victim = busy_on(world, planner, "a", "n1", 0)
    planner.then("b", place("n1", kv_mib=20, stops=(victim.id,)))
    world.demand("b", 1)
    assert lone(world, "b", _I.READY)
    assert world.agents["n1"].weights.keys() == {(digest_of("a"), 0), (digest_of("b"), 0)}


def test_idle_weights_are_dropped_before_the_start(scripted) -> None:
    world, planner = scripted(gpu("n1"))
    gone = busy_on(world, planner, "a", "n1", 0)
    world.ask(lambda ticket: StopModel(ticket, "a"))
    assert gone.id not in world.view.instances
    assert world.view.memory.idle_weights["n1", 0] == {digest_of("a"): 8 << 20}
    planner.then("b", place("n1", kv_mib=15, drops=(digest_of("a"),)))
    before = len(world.history)
    world.demand("b", 1)
    assert lone(world, "b", _I.READY)
    first = next(step for _, _, step in world.history[before:])
    sends = [one.message for one in first.effects if isinstance(one, Send)]
    assert [type(one) for one in sends] == [DropCheckpoint], "the start waits for the room"
    assert world.agents["n1"].weights.keys() == {(digest_of("b"), 0)}


def test_a_drop_that_a_plan_named_and_a_device_does_not_need_any_more_is_still_made_first(scripted) -> None:
    """Weights that lie there and are on their way out count as there until the node says otherwise."""
    world, planner = scripted(gpu("n1"))
    busy_on(world, planner, "a", "n1", 0)
    world.ask(lambda ticket: StopModel(ticket, "a"))
    manual(world)
    planner.then("b", place("n1", kv_mib=15, drops=(digest_of("a"),)))
    world.demand("b", 1)
    newcomer = lone(world, "b", _I.PLANNED)
    states = [one.state for one in world.view.placements_at(digest_of("a"), "n1").values() if one.tier is Tier.DEVICE]
    assert states == [TierState.EVICTING]
    assert not world.view.memory.idle_weights["n1", 0]
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert newcomer.state is _I.STARTING


def test_two_planned_one_behind_the_other_begin_in_their_order(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=40))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", drains=(victim.id,), drops=(digest_of("a"),), kv_mib=20))
    world.demand("b", 1)
    planner.then("c", place("n1", kv_mib=4))
    world.demand("c", 1)
    first, second = lone(world, "b", _I.PLANNED), lone(world, "c", _I.PLANNED)
    end(world, victim)
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert (first.state, second.state) == (_I.STARTING, _I.STARTING)


def test_one_behind_a_planned_one_that_goes_begins(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=40))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", drains=(victim.id,), kv_mib=20))
    world.demand("b", 1)
    planner.then("c", place("n1", kv_mib=4))
    world.demand("c", 1)
    behind = lone(world, "c", _I.PLANNED)
    world.demand("b", 0)
    assert behind.state is _I.STARTING
    assert victim.state is _I.DRAINING


def test_weights_that_wait_for_a_planned_one_do_not_count_twice(scripted) -> None:
    """Device 0 holds a's weights and b, which drains; a is planned again beside them, and c behind it."""
    world, planner = scripted(gpu("n1", device_mib=50))
    busy_on(world, planner, "a", "n1", 0)
    leaving = busy_on(world, planner, "b", "n1")
    world.ask(lambda ticket: StopModel(ticket, "a"))
    manual(world)
    world.ask(lambda ticket: DeployModel(ticket, "a", None))
    planner.then("a", place("n1", kv_mib=26, drains=(leaving.id,)))
    world.demand("a", 1)
    planner.then("c", place("n1", kv_mib=4))
    world.demand("c", 1)
    first, second = lone(world, "a", _I.PLANNED), lone(world, "c", _I.PLANNED)
    end(world, leaving)
    assert first.state is _I.STARTING
    assert second.state is _I.PLANNED, "8 MiB of b's weights are in its way, which only it may have dropped"
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert second.state is _I.STARTING


def test_own_weights_do_not_hide_that_others_must_leave(scripted) -> None:
    """A planned instance whose own weights lie on its device already, after its drain left another's weights there."""
    world, planner = scripted(gpu("n1", device_mib=36))
    busy_on(world, planner, "a", "n1", 0)
    leaving = busy_on(world, planner, "b", "n1")
    world.ask(lambda ticket: StopModel(ticket, "a"))
    manual(world)
    world.ask(lambda ticket: DeployModel(ticket, "a", None))
    planner.then("a", place("n1", kv_mib=24, drains=(leaving.id,)))
    world.demand("a", 1)
    planned = lone(world, "a", _I.PLANNED)
    end(world, leaving)
    (op,) = world.agents["n1"].ops
    world.tell("n1", world.agents["n1"].finish(op))
    assert planned.state is _I.STARTING
    assert world.agents["n1"].weights.keys() == {(digest_of("a"), 0)}


def test_an_instance_of_several_devices_needs_its_room_on_each(scripted) -> None:
    world, planner = scripted(gpu("n1", devices=2, device_mib=20))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", devices=(0, 1), kv_mib=10, drains=(victim.id,), drops=(digest_of("a"),)))
    world.demand("b", 1)
    planned = lone(world, "b", _I.PLANNED)
    end(world, victim)
    world.tell("n1", world.agents["n1"].finish(next(iter(world.agents["n1"].ops))))
    assert planned.state is _I.STARTING
    assert world.agents["n1"].weights == {(digest_of("b"), 0): 4 << 20, (digest_of("b"), 1): 4 << 20}


def test_the_arena_is_waited_for_as_well(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=100, arena_mib=9))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", drains=(victim.id,)))
    world.demand("b", 1)
    planned = lone(world, "b", _I.PLANNED)
    end(world, victim)
    assert planned.state is _I.STARTING


# --- planned, and not begun ---


def waiting_for_a_drain(scripted) -> tuple[World, ScriptedPlanner, Instance, Instance]:
    world, planner = scripted(gpu("n1"), gpu("n2"))
    victim = busy_on(world, planner, "a", "n1")
    manual(world)
    planner.then("b", place("n1", drains=(victim.id,), drops=(digest_of("a"),)))
    world.demand("b", 1)
    return world, planner, victim, lone(world, "b", _I.PLANNED)


def test_planned_for_nobody_any_more_goes(scripted) -> None:
    world, _, _, planned = waiting_for_a_drain(scripted)
    world.demand("b", 0)
    assert planned.id not in world.view.instances
    assert not world.view.memory.planned_bytes["n1", 0]
    world.check_rows()


def test_planned_for_a_model_that_is_stopped_goes(scripted) -> None:
    world, _, _, planned = waiting_for_a_drain(scripted)
    world.ask(lambda ticket: StopModel(ticket, "b"))
    assert planned.id not in world.view.instances


def test_planned_on_a_node_that_is_lost_is_planned_elsewhere_at_once(scripted) -> None:
    world, planner, _, planned = waiting_for_a_drain(scripted)
    planner.then("b", place("n2"))
    world.lose("n1")
    assert planned.id not in world.view.instances
    assert lone(world, "b", _I.STARTING).node == "n2"


def test_planned_is_planned_anew_when_its_room_does_not_come(scripted) -> None:
    world, planner, victim, planned = waiting_for_a_drain(scripted)
    world.pass_time(SETTINGS.room_timeout_s - 1.0)
    assert planned.state is _I.PLANNED
    assert victim.id not in world.view.instances, "overdue, but the weights that it left lie there yet"
    planner.then("b", place("n2"))
    world.pass_time(2.0)
    assert planned.id not in world.view.instances
    assert "NoRoom" in world.reasons("instance")
    assert lone(world, "b", _I.STARTING).node == "n2"


def test_planned_whose_room_nobody_will_make_is_planned_anew_soon(scripted) -> None:
    world, planner = scripted(gpu("n1"), gpu("n2"))
    stays = busy_on(world, planner, "a", "n1")
    planner.then("b", place("n1"), place("n2"))
    world.demand("b", 1)
    assert not world.view.instances_of("b")
    assert "RoomLost" in world.reasons("instance")
    assert len([name for name, _ in planner.asked if name == "b"]) == 1, "not at once: that might go on for ever"
    world.pass_time(SETTINGS.evict_look_s)
    assert lone(world, "b", _I.READY).node == "n2"
    assert stays.state is _I.READY


@pytest.mark.parametrize("drained", [False, True])
def test_planned_rows_go_on_by_the_same_rule_after_a_restart(scripted, drained: bool) -> None:
    world, _, victim, planned = waiting_for_a_drain(scripted)
    world.start_manager()
    again = world.view.instances[planned.id]
    assert (again.state, again.plan) == (_I.PLANNED, None)
    if drained:
        world.agents["n1"].become(victim.id, _I.STOPPED)
    world.demand("b", 1)
    world.connect("n1")
    world.connect("n2")
    assert again.state is _I.PLANNED
    if not drained:
        end(world, world.view.instances[victim.id])
    (op,) = world.agents["n1"].ops
    world.tell("n1", world.agents["n1"].finish(op))
    assert again.state is _I.STARTING
    world.check_rows()


def test_planned_rows_end_on_a_node_that_does_not_come_back(scripted) -> None:
    world, planner, _, planned = waiting_for_a_drain(scripted)
    world.start_manager()
    world.demand("b", 1)
    world.connect("n2")
    planner.then("b", place("n2"))
    world.pass_time(SETTINGS.unreachable_grace_s + 1.0)
    assert planned.id not in world.view.instances
    assert lone(world, "b", _I.STARTING).node == "n2"


# --- drops that do not succeed ---


def test_weights_that_a_node_does_not_drop_may_be_used_again_and_are_not_asked_for_without_end(scripted) -> None:
    world, planner = scripted(gpu("n1"))
    busy_on(world, planner, "a", "n1", 0)
    world.ask(lambda ticket: StopModel(ticket, "a"))
    agent = world.agents["n1"]
    agent.automatic = False
    planner.then("b", place("n1", kv_mib=15, drops=(digest_of("a"),)))
    world.demand("b", 1)
    for _ in range(3):
        before = len(agent.heard)
        world.tell("n1", agent.finish(next(iter(agent.ops)), Fault("internal", "the driver says no")))
        (record,) = [one for one in world.view.placements_at(digest_of("a"), "n1").values() if one.tier is Tier.DEVICE]
        assert record.state is TierState.RESIDENT
        assert not [one for one in agent.heard[before:] if isinstance(one, DropCheckpoint)]
        world.pass_time(SETTINGS.drop_retry_s * SETTINGS.drop_attempts + 0.1)
        assert [one for one in agent.heard[before:] if isinstance(one, DropCheckpoint)]
    assert world.reasons("checkpoint").count("DropFailed") == 3
    world.tell("n1", agent.finish(next(iter(agent.ops))))
    assert lone(world, "b", _I.STARTING)
    world.check_rows()


def test_weights_that_are_used_again_are_not_asked_for_any_more(scripted) -> None:
    world, planner = scripted(gpu("n1", device_mib=60))
    busy_on(world, planner, "a", "n1", 0)
    world.ask(lambda ticket: StopModel(ticket, "a"))
    agent = world.agents["n1"]
    agent.automatic = False
    planner.then("b", place("n1", drops=(digest_of("a"),)))
    world.demand("b", 1)
    planner.then("a", place("n1"))
    world.ask(lambda ticket: DeployModel(ticket, "a", None))
    world.demand("a", 1)
    again = lone(world, "a", _I.STARTING)
    ready(world, again)
    world.tell("n1", agent.finish(next(iter(agent.ops))))
    world.pass_time(60.0)
    assert len([one for one in agent.heard if isinstance(one, DropCheckpoint)]) == 1
    assert "DropFailed" not in world.reasons()


# --- preempted ---


def test_the_preempted_end_at_once_and_are_started_elsewhere_if_they_are_wanted(scripted) -> None:
    world, planner = scripted(gpu("n1"), gpu("n2"))
    victim = busy_on(world, planner, "a", "n1", 3)
    planner.then("b", place("n1", preempts=(victim.id,), drops=(digest_of("a"),)))
    planner.then("a", place("n2"))
    world.say(DemandChanged("b", 1, 0))
    assert victim.state is _I.STOPPING
    stop = next(one.message for one in world.history[-1][2].effects if isinstance(one, Send))
    assert isinstance(stop, StopInstance)
    assert stop.grace_s == 0.0
    world.settle()
    world.demand("a", 3)
    assert lone(world, "b", _I.READY).node == "n1"
    assert lone(world, "a", _I.READY).node == "n2"


def test_a_stale_word_of_a_drop_changes_nothing(scripted) -> None:
    world, _, _, _ = waiting_for_a_drain(scripted)
    step = world.say(FromNode("n1", OperationDone(op="nobody", digest="", fault=None)))
    assert step.changes == []


def test_weights_that_lie_elsewhere_do_not_matter(scripted) -> None:
    world, planner = scripted(gpu("n1", devices=2))
    busy_on(world, planner, "a", "n1", 0)
    planner.then("b", place("n1", devices=(1,), kv_mib=17))
    world.demand("b", 1)
    assert lone(world, "b", _I.READY).devices == (1,)
    assert not [one for one in world.agents["n1"].heard if isinstance(one, DropCheckpoint)]

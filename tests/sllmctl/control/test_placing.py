"""Plans carried out: room reserved first, victims told, weights dropped, newcomers begun when their room is there, or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schema.errors import Fault
from schema.link import DropCheckpoint, OperationDone, StartInstance, StopInstance
from schema.states import InstanceState, Tier, TierState
from sllmctl.control.effects import DemandChanged, DeployModel, FromNode, InstanceActivity, Send, StopModel
from sllmctl.control.records import Instance
from sllmctl.control.settings import ControlSettings
from sllmctl.planner.plans import Abilities
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.scripted import ScriptedPlanner, move, place
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState
SETTINGS = ControlSettings(prefetch_every_s=0.0)
MODELS = ("a", "b", "c")


def gpu(name: str, *, device_mib: int = 25, devices: int = 1, arena_mib: int = 1000) -> Agent:
    """Room for one instance of 10 MiB of KV cache and 8 of weights, and a little."""
    agent = Agent(name, kind="cuda", device_mib=device_mib, devices=devices, arena_mib=arena_mib)
    for model in MODELS:
        agent.hold(model)
    return agent


@pytest.fixture
def scripted(make_world: MakeWorld) -> Callable[..., tuple[World, ScriptedPlanner]]:
    """Nodes n1, n2... as given, the models a, b and c deployed, and a planner that does what it is told."""

    def make(*agents: Agent, most: int = 1, keep_alive_s: float = 1000.0) -> tuple[World, ScriptedPlanner]:
        planner = ScriptedPlanner()
        world = make_world(*agents, settings=SETTINGS, abilities=Abilities(migrate=True, fetch=True), planner=planner)
        for agent in agents:
            world.connect(agent.name)
        for model in MODELS:
            world.serve(spec(model, node=agents[0].name, most=most, keep_alive_s=keep_alive_s))
        return world, planner

    return make


def busy_on(world: World, planner: ScriptedPlanner, model: str, node: str, running: int = 1) -> Instance:
    planner.then(model, place(node))
    return world.served(model, running)


def manual(world: World) -> None:
    for agent in world.agents.values():
        agent.automatic = False


def end(world: World, instance: Instance) -> None:
    """What drains or stops has ended."""
    world.tell(instance.node, world.agents[instance.node].become(instance.id, _I.STOPPED))


def ready(world: World, instance: Instance) -> None:
    world.tell(instance.node, world.agents[instance.node].become(instance.id, _I.READY))


def lone(world: World, model: str, *states: InstanceState) -> Instance:
    (found,) = [one for one in world.view.instances_of(model).values() if one.state in states]
    return found


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


# --- moves ---


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

"""Lives: begun, dead and begun again, given up; and what nodes say of them after either side was away."""

from __future__ import annotations

import msgspec
import pytest

from schema.errors import Fault
from schema.ids import Epoch
from schema.link import InstanceTruth, InstanceUpdate, InventoryUpdate, PlacementUpdate, StartInstance, StopInstance
from schema.memory import StepCosts
from schema.states import InstanceState, TierState
from sllmctl.cluster.changes import PutEstimate
from sllmctl.cluster.records import Instance
from sllmctl.cluster.settings import ControlSettings
from sllmctl.control.effects import RouteChanged
from sllmctl.control.events import AddModel, DeployModel, FromNode, StopInstanceNow
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState


def test_a_cold_start_is_written_then_sent_then_routed(world: World) -> None:
    world.serve(spec())
    assert not world.view.instances
    world.demand("m", 1)
    instance = world.only()
    assert (instance.state, instance.working_bytes) == (_I.READY, 10 << 20)
    assert world.puts(instance.id) == [_I.STARTING, _I.READY]
    route = world.routes[instance.id]
    assert (route.state, route.reachable, route.kv_capacity_tokens, route.max_concurrency) == (_I.READY, True, 4096, 4)
    (start,) = [one for one in world.agents["local"].heard if isinstance(one, StartInstance)]
    assert (start.options.max_context_tokens, start.options.max_concurrency) == (512, 4)
    assert world.reasons("instance") == ["Scheduled", "Ready"]
    assert "the only place: weights on disk" in instance.reason


def test_what_a_step_takes_is_promised_with_the_cache_and_told_apart_to_the_node(world: World) -> None:
    world.serve(spec(kv_mib=2))
    checkpoint = world.view.checkpoints[digest_of("m")]
    checkpoint.step = StepCosts(token_bytes=64, layer_kv_bytes=8, item_bytes=2, vocab_size=100)
    beside = checkpoint.step.step_bytes(sequences=4, context_tokens=512, kv_tokens=2048)
    world.demand("m", 1)
    instance = world.only()
    assert instance.working_bytes == (2 << 20) + beside
    (start,) = [one for one in world.agents["local"].heard if isinstance(one, StartInstance)]
    assert (start.options.kv_bytes, start.options.step_bytes) == (2 << 20, beside)


def test_the_first_restart_is_immediate_and_the_router_hears_of_the_death_first(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    first = instance.epoch
    before = len(world.history)
    world.agents["local"].automatic = False
    world.crash(instance)
    step = world.history[before][2]
    routes = [(one.state, one.epoch) for one in step.effects if isinstance(one, RouteChanged)]
    assert routes == [(_I.BACKOFF, first), (_I.STARTING, instance.epoch)]
    assert instance.epoch > first
    assert world.only() is instance
    assert (instance.restarts, instance.fault) == (1, Fault("internal", "the worker was killed"))


def test_further_restarts_back_off_and_end(make_world: MakeWorld) -> None:
    settings = ControlSettings(restart_first_s=1.0, restart_longest_s=3.0, restarts_max=5)
    world = make_world(Agent("local"), settings=settings)
    world.connect("local")
    world.serve(spec(least=1))
    delays = []
    instance = world.only()
    for _ in range(5):
        world.crash(instance)
        if instance.state is _I.BACKOFF:
            assert instance.retry_at is not None
            delays.append(instance.retry_at - world.now)
            world.pass_time(delays[-1])
        assert instance.state is _I.READY
    assert delays == [1.0, 2.0, 3.0, 3.0]
    world.crash(instance)
    assert instance.state is _I.FAILED
    assert world.agents["local"].lives == {}
    assert not any(world.view.memory.committed_bytes.values())
    world.demand("m", 2)
    refused = world.rejected[-1]
    assert f"failed instances, {instance.id} for: the worker was killed; it is tried again in 60 s" in refused.fault.message
    assert refused.retry_after_s == 60.0
    world.demand("m", 0)
    world.pass_time(20.0)
    world.demand("m", 1)
    assert world.rejected[-1].retry_after_s == 40.0
    assert world.only() is instance
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    assert world.only().id != instance.id
    assert world.only().state is _I.READY
    world.check_rows()


def test_an_instance_that_is_never_given_up_is_restarted_after_the_longest_delay(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), settings=ControlSettings(restart_longest_s=3.0, restarts_max=1_000_000))
    world.connect("local")
    world.serve(spec(least=1))
    instance = world.only()
    instance.restarts = 100_000
    world.crash(instance)
    assert instance.state is _I.BACKOFF
    assert instance.retry_at == world.now + 3.0


def _give_up(world: World) -> Instance:
    """The model's instance, failed."""
    for _ in range(world.settings.restarts_max + 1):
        instance = world.only()
        world.pass_time(max(0.0, (instance.retry_at or 0.0) - world.now))
        world.crash(instance)
    assert instance.state is _I.FAILED
    return instance


def test_a_failed_one_is_tried_again_after_pauses_that_grow(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), settings=ControlSettings(retry_first_s=60.0, retry_longest_s=200.0))
    world.connect("local")
    world.serve(spec(least=1))
    pauses = []
    for _ in range(4):
        failed = _give_up(world)
        assert failed.retry_at is not None
        pauses.append(failed.retry_at - world.now)
        assert f"it is tried again in {pauses[-1]:.0f} s" in world.events[-1].message
        world.pass_time(pauses[-1] - 1.0)
        assert world.only() is failed
        world.pass_time(1.0)
        assert world.only().state is _I.READY
    assert pauses == [60.0, 120.0, 200.0, 200.0]
    assert world.reasons("instance").count("Retried") == 4
    world.pass_time(world.settings.healthy_s)
    failed = _give_up(world)
    assert failed.retry_at == world.now + 60.0, "one that lived well has set the pauses back"
    world.check_rows()


def test_a_failed_one_is_tried_again_elsewhere_if_it_can_be(make_world: MakeWorld) -> None:
    one, two = Agent("a"), Agent("b")
    one.hold("m", dram=True)
    two.hold("m")
    world = make_world(one, two)
    world.connect("a")
    world.connect("b")
    world.ask(lambda ticket: AddModel(ticket, spec(least=1, node="a")))
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    went = []
    for _ in range(3):
        went.append(_give_up(world).node)
        world.pass_time((world.only().retry_at or 0.0) - world.now)
    assert went == ["a", "b", "a"], "where both have failed it is the nearer one"
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    assert not world.view.models["m"].avoided, "an operator says that it is to be tried"


def test_one_that_lived_well_and_was_stopped_sets_the_pauses_back_too(world: World) -> None:
    world.serve(spec(keep_alive_s=100.0))
    world.demand("m", 1)
    _give_up(world)
    world.demand("m", 0)
    world.pass_time(world.settings.retry_first_s)
    world.served("m")
    world.pass_time(100.0)
    assert not world.view.instances, "it was scaled to zero"
    assert not world.view.models["m"].avoided
    world.demand("m", 1)
    failed = _give_up(world)
    assert failed.retry_at == world.now + world.settings.retry_first_s


def test_a_failed_one_that_nobody_waits_for_gives_its_place_to_the_next_request(world: World) -> None:
    world.serve(spec())
    world.demand("m", 1)
    _give_up(world)
    assert len(world.rejected) == 1
    world.demand("m", 0)
    world.pass_time(world.settings.retry_first_s)
    assert not world.view.instances
    world.demand("m", 1)
    assert world.only().state is _I.READY
    assert len(world.rejected) == 1


def test_a_failed_one_is_tried_again_elsewhere_while_its_node_is_away(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("other"), settings=ControlSettings(unreachable_grace_s=3600.0))
    for agent in world.agents.values():
        agent.hold("m")
        world.connect(agent.name)
    world.serve(spec(least=1, node="local"))
    for start_anew in (False, True):
        failed = _give_up(world)
        away, there = (failed.node, "other") if failed.node == "local" else (failed.node, "local")
        if start_anew:
            world.start_manager()
            world.connect(there)
            world.pass_time(0.0)
        else:
            world.lose(away)
            world.pass_time(world.settings.retry_first_s)
        assert (world.only().state, world.only().node) == (_I.READY, there)
        world.connect(away)
        assert away not in {life.node for life in world.view.instances.values()}
        assert world.agents[away].lives == {}, "its node need not state it any more"
    world.check_rows()


@pytest.mark.parametrize("change", ["a node joins", "a copy appears", "a copy is sound again", "the manager starts anew"])
def test_what_can_never_start_is_tried_again_once_something_has_changed(make_world: MakeWorld, change: str) -> None:
    world = make_world(Agent("local"), Agent("other"))
    world.connect("local")
    if change == "a copy appears":
        world.connect("other")
    world.serve(spec(least=1))
    if change == "a copy is sound again":
        _copy(world, "local", TierState.QUARANTINED)
    world.crash(world.only(), Fault("invalid_checkpoint", "a tensor is missing"))
    failed = world.only()
    assert (failed.state, failed.retry_at) == (_I.FAILED, None)
    world.pass_time(10 * world.settings.retry_longest_s)
    assert world.only() is failed
    match change:
        case "a node joins":
            world.connect("other")
        case "a copy appears":
            _copy(world, "other", TierState.RESIDENT)
        case "a copy is sound again":
            _copy(world, "local", TierState.RESIDENT)
        case "the manager starts anew":
            world.start_manager()
            assert world.only().state is _I.FAILED
            world.connect("local")
    assert world.only().id != failed.id
    assert world.only().state is _I.READY
    world.check_rows()


def test_what_failed_elsewhere_while_a_node_was_away_is_tried_again_once_it_is_back(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("other"))
    for agent in world.agents.values():
        agent.hold("m")
        world.connect(agent.name)
    wrong = Fault("invalid_input", "its devices are too old")
    world.lose("other")
    world.serve(spec(least=1, node="local"))
    world.crash(world.only(), wrong)
    failed = world.only()
    assert (failed.state, failed.retry_at) == (_I.FAILED, None)
    world.pass_time(world.settings.unreachable_grace_s + 1.0)
    world.connect("other")
    again = world.only()
    assert (again.state, again.node) == (_I.READY, "other")
    world.lose("other")
    world.crash(again, wrong)
    world.pass_time(1.0)
    world.connect("other")
    assert (world.only(), again.state) == (again, _I.FAILED), "the node on which it failed is no news"
    world.pass_time(1.0)
    world.lose("local")
    world.connect("local")
    assert world.only() is again, "it failed with both there"
    world.check_rows()


def _copy(world: World, node: str, state: TierState) -> None:
    """A node tells of its copy of the model on disk."""
    agent = world.agents[node]
    agent.hold("m")
    held = agent.checkpoints[digest_of("m")]
    copy = msgspec.structs.replace(held, placements=(msgspec.structs.replace(held.placements[0], state=state),))
    agent.checkpoints[digest_of("m")] = copy
    world.do(FromNode(node, PlacementUpdate(truth=copy)))


def test_a_restart_is_not_put_off_by_a_clock_that_was_set_back(world: World) -> None:
    world.serve(spec(least=1))
    for _ in range(3):
        world.crash(world.only())
    assert world.only().state is _I.BACKOFF
    world.now -= 3600.0
    world.start_manager()
    world.connect("local")
    world.pass_time(world.settings.restart_longest_s)
    assert world.only().state is _I.READY


def test_a_healthy_life_sets_the_count_back(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    world.crash(instance)
    assert instance.restarts == 1
    world.pass_time(world.settings.healthy_s)
    world.crash(instance)
    assert (instance.restarts, instance.state) == (1, _I.READY)


def test_what_can_never_start_is_not_tried_again(world: World) -> None:
    world.serve(spec(least=1))
    world.crash(world.only(), Fault("invalid_checkpoint", "a tensor is missing"))
    assert world.only().state is _I.FAILED
    assert "can never start" in world.events[-1].message


def test_a_death_that_nobody_minds_is_not_restarted(world: World) -> None:
    world.serve(spec(keep_alive_s=50.0))
    world.demand("m", 1)
    world.demand("m", 0)
    instance = world.only()
    world.agents["local"].automatic = False
    world.tell("local", world.agents["local"].become(instance.id, _I.STOPPED))
    assert not world.view.instances
    assert world.reasons("instance")[-1] == "Gone"


def test_a_start_that_takes_too_long_counts_as_a_death(world: World) -> None:
    world.serve(spec())
    agent = world.agents["local"]
    agent.automatic = False
    world.demand("m", 1)
    instance = world.only()
    first = instance.epoch
    world.pass_time(world.settings.start_timeout_s)
    assert instance.fault is not None
    assert instance.fault.code == "timed_out"
    assert instance.epoch > first
    assert agent.lives[instance.id].epoch == instance.epoch


def test_words_of_an_older_life_are_dropped(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    old = instance.epoch
    world.crash(instance)
    assert instance.state is _I.READY
    stale = InstanceTruth(instance=instance.id, epoch=old, digest=instance.digest, state=_I.STOPPED)
    step = world.say(FromNode("local", InstanceUpdate(truth=stale)))
    assert step.changes == []
    assert instance.state is _I.READY


def test_an_operator_stops_one_and_the_scale_decides(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    assert world.ask(lambda ticket: StopInstanceNow(ticket, instance.id)) is None
    assert world.only().id != instance.id
    answer = world.ask(lambda ticket: StopInstanceNow(ticket, instance.id))
    assert answer is not None
    assert answer.code == "not_found"


def test_a_draining_instance_finishes_first_and_an_overdue_one_is_told_again(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: StopInstanceNow(ticket, instance.id))
    assert instance.state is _I.DRAINING
    assert world.routes[instance.id].state is _I.DRAINING
    stops = [one for one in agent.heard if isinstance(one, StopInstance)]
    assert [one.grace_s for one in stops] == [world.settings.drain_s]
    world.pass_time(world.settings.drain_s + world.settings.stop_timeout_s)
    assert instance.id not in world.view.instances
    assert "StopOverdue" in world.reasons("instance")


def test_a_restarted_manager_adopts_what_is_ready(world: World) -> None:
    world.serve(spec(least=1))
    before = world.only()
    world.start_manager()
    assert world.routes[before.id].reachable is False
    assert world.dialled == ["local"]
    world.connect("local")
    instance = world.only()
    assert (instance.id, instance.epoch, instance.state) == (before.id, before.epoch, _I.READY)
    assert world.routes[before.id].reachable is True
    assert world.routes[before.id].kv_capacity_tokens == 4096
    assert world.models["m"].digest == digest_of("m")
    assert sum(isinstance(one, StartInstance) for one in world.agents["local"].heard) == 1
    world.check_rows()


def test_a_restarted_manager_keeps_a_keep_alive(world: World) -> None:
    world.serve(spec(keep_alive_s=30.0))
    world.demand("m", 1)
    world.start_manager()
    world.connect("local")
    world.pass_time(29.0)
    assert world.only().state is _I.READY
    world.pass_time(2.0)
    assert not world.view.instances


def test_a_start_whose_words_were_lost_is_begun_again(world: World) -> None:
    world.serve(spec())
    agent = world.agents["local"]
    agent.connected = False
    world.demand("m", 1)
    assert (world.only().state, agent.lives) == (_I.STARTING, {})
    world.lose("local")
    world.connect("local")
    assert (world.only().state, world.only().restarts) == (_I.READY, 1)


def test_a_death_while_the_link_was_down_is_seen_in_the_truth(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    agent = world.agents["local"]
    world.lose("local")
    assert world.routes[instance.id].reachable is False
    assert world.routes[instance.id].state is _I.READY
    agent.become(instance.id, _I.STOPPED, Fault("internal", "it was killed"))
    world.connect("local")
    assert (instance.state, instance.restarts) == (_I.READY, 1)


@pytest.mark.parametrize("state", [_I.READY, _I.STARTING, _I.STOPPED])
def test_a_life_that_the_manager_does_not_know_is_stopped(world: World, state: InstanceState) -> None:
    agent = world.agents["local"]
    agent.lives["inst_x"] = InstanceTruth(instance="inst_x", epoch=Epoch(5), digest=digest_of("m"), state=state)
    world.lose("local")
    world.connect("local")
    assert agent.lives == {}
    assert world.view.instances == {}
    assert sum(isinstance(one, StopInstance) for one in agent.heard) == 1


def test_a_stop_that_was_lost_is_said_again(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    world.lose("local")
    world.ask(lambda ticket: StopInstanceNow(ticket, instance.id))
    assert instance.state is _I.DRAINING
    world.connect("local")
    assert instance.id not in world.view.instances
    assert world.agents["local"].lives.keys() == world.view.instances.keys()


def test_a_node_that_stops_an_instance_in_order_is_believed(world: World) -> None:
    world.serve(spec())
    world.demand("m", 1)
    world.demand("m", 0)
    instance = world.only()
    world.tell("local", world.agents["local"].become(instance.id, _I.DRAINING))
    assert world.routes[instance.id].state is _I.DRAINING
    world.tell("local", world.agents["local"].become(instance.id, _I.STOPPED))
    assert not world.view.instances


def test_lost_instances_move_to_another_node_after_the_grace(make_world: MakeWorld) -> None:
    first, second = Agent("a"), Agent("b")
    world = make_world(first, second)
    world.connect("a")
    world.connect("b")
    world.ask(lambda ticket: AddModel(ticket, spec(least=1, node="a")))
    second.hold("m")
    world.say(FromNode("b", second.truth()))
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    lost = world.only()
    world.lose(lost.node)
    world.pass_time(world.settings.unreachable_grace_s - 1)
    assert world.only() is lost
    world.pass_time(1)
    assert world.only().node != lost.node
    assert world.only().state is _I.READY
    assert "Lost" in world.reasons("instance")
    world.connect(lost.node)
    assert world.agents[lost.node].lives == {}
    world.check_rows()


def test_a_backing_off_instance_waits_for_its_node(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    world.crash(instance)
    world.crash(instance)
    assert instance.state is _I.BACKOFF
    world.lose("local")
    world.pass_time(10.0)
    assert instance.state is _I.BACKOFF
    world.connect("local")
    assert instance.state is _I.READY


def test_a_node_that_cannot_fork_yet_is_the_later_place_and_its_wait_is_part_of_the_estimate(make_world: MakeWorld) -> None:
    fresh, other = Agent("a"), Agent("b")
    fresh.hold("m")
    fresh.numerics = ""
    world = make_world(fresh, other)
    world.connect("a")
    world.connect("b")
    world.ask(lambda ticket: AddModel(ticket, spec(most=2, node="b", kv_mib=15)))
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    assert world.view.nodes["a"].imports_since == world.now

    def starts_in_s(node: str) -> float:
        instance = world.view.instances_of("m")
        plan = next(one.plan for one in instance.values() if one.node == node)
        assert plan is not None
        return plan.best.startup_s

    world.demand("m", 8)
    assert starts_in_s("a") == pytest.approx(starts_in_s("b") + world.settings.import_s, abs=0.1)
    world.now += 3.0
    fresh.numerics = "torch"
    world.do(FromNode("a", InventoryUpdate(inventory=fresh.truth().inventory)))
    assert world.view.nodes["a"].imports_since is None
    known = world.loop.step(FromNode("a", InventoryUpdate(inventory=fresh.truth().inventory)), world.now)
    assert not any(isinstance(change, PutEstimate) for change in known.changes), "what is known already teaches nothing"
    learned = [change for _, _, step in world.history for change in step.changes if isinstance(change, PutEstimate)]
    assert {change.key: change.samples[-1] for change in learned if change.key.startswith("import/")} == {
        "import/a": 3.0,
        "import/": 3.0,
    }

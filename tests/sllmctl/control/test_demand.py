"""Who gets room first, who keeps it and for how long, what is brought ahead, and what is learned and remembered on the way."""

from __future__ import annotations

import pytest

from schema.admin import OutcomeView
from schema.link import LoadCheckpoint, StartPhases
from schema.states import InstanceState, Tier
from sllmctl.cluster.changes import PutEstimate
from sllmctl.cluster.plans import Plan, Refusal, Rejection, Wait
from sllmctl.cluster.settings import ControlSettings
from sllmctl.control.decisions import Decisions
from sllmctl.control.demand import called, heat
from sllmctl.control.events import PrefillTimed, StopInstanceNow
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.scripted import ScriptedPlanner, place
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState
QUIET = ControlSettings(prefetch_every_s=0.0)


def rows(world: World, kind: type) -> list[object]:
    return [one for _, _, step in world.history for one in step.changes if isinstance(one, kind)]


# --- room ---


def test_a_big_model_is_not_starved_by_a_stream_of_small_ones(make_world: MakeWorld) -> None:
    world = make_world(Agent("local", device_mib=20), settings=QUIET)
    world.connect("local")
    world.serve(spec("big", kv_mib=20))
    small = [f"s{number}" for number in range(6)]
    for name in small:
        world.serve(spec(name, kv_mib=10))
    world.demand("big", 1)
    for name in small[:2]:
        world.demand(name, 1)
    began = world.now
    for _ in range(200):
        if any(one.state is _I.READY for one in world.view.instances_of("big").values()):
            break
        for name in small:
            for one in world.view.instances_of(name).values():
                if one.state is _I.READY:
                    world.busy(one, 1)
                    world.demand(name, 0, 1)
                    world.busy(one, 0)
            world.demand(name, 1)
        world.pass_time(0.5)
    assert world.now - began <= world.settings.age_s + world.settings.drain_longest_s + 1.0
    assert world.only("big").state is _I.READY


def test_who_waited_age_s_is_asked_first_when_room_appears(make_world: MakeWorld) -> None:
    planner = ScriptedPlanner()
    world = make_world(Agent("local"), settings=QUIET, planner=planner)
    world.connect("local")
    for name in "abc":
        world.serve(spec(name))
    planner.then("c", place("local"))
    world.served("c", 1)
    world.demand("b", 1)
    world.pass_time(5.0)
    world.demand("a", 1)
    world.pass_time(world.settings.age_s - 1.0)
    planner.asked.clear()
    world.ask(lambda ticket: StopInstanceNow(ticket, world.only("c").id))
    assert planner.asked[0][0] == "b"
    assert [name for name, _ in planner.asked].count("b") == 1, "once in a turn"
    assert world.view.line == [(1_000_000.0, "b"), (1_000_005.0, "a")]


def test_of_thousands_who_wait_only_a_few_are_asked_at_an_event(make_world: MakeWorld) -> None:
    planner = ScriptedPlanner()
    world = make_world(Agent("local"), settings=QUIET, planner=planner)
    world.connect("local")
    names = [f"m{number:03}" for number in range(120)]
    for name in names:
        world.serve(spec(name))
        world.demand(name, 1)
    world.serve(spec("x"))
    planner.then("x", place("local"))
    world.served("x", 1)
    world.pass_time(world.settings.age_s)
    planner.asked.clear()
    world.crash(world.only("x"))
    assert len(planner.asked) <= 10
    planner.asked.clear()
    world.pass_time(20.0)
    assert {name for name, _ in planner.asked} >= set(names), "each has its turn"


def test_one_that_has_served_nobody_is_kept_a_while(make_world: MakeWorld) -> None:
    world = make_world(Agent("local", device_mib=15), settings=QUIET)
    world.connect("local")
    for name in "ab":
        world.serve(spec(name))
    world.demand("a", 1)
    unserved = world.only("a")
    world.demand("a", 0)
    world.demand("b", 1)
    world.pass_time(world.settings.unserved_s - 1.0)
    assert world.only("a") is unserved
    world.pass_time(2.0)
    assert not world.view.instances_of("a")
    assert world.only("b").state is _I.READY


def test_a_wait_is_looked_at_again_when_who_served_is_gone(make_world: MakeWorld) -> None:
    planner = ScriptedPlanner()
    world = make_world(Agent("local"), settings=QUIET, planner=planner)
    world.connect("local")
    world.serve(spec("a", most=2))
    planner.then("a", place("local"))
    first = world.served("a", 4)
    best = place("local").best
    planner.then("a", Wait(20.0, best, {}, "sooner by what is there"), place("local"))
    world.demand("a", 1, 4)
    world.pass_time(world.settings.scale_up_after_s)
    assert len(planner.asked) == 2
    world.demand("a", 2, 4)
    assert len(planner.asked) == 2, "not at each request"
    world.agents["local"].automatic = False
    world.tell("local", world.agents["local"].become(first.id, _I.DRAINING))
    assert len(world.view.instances_of("a")) == 2


@pytest.mark.parametrize(("reload_s", "kept_s"), [(0.1, 30.0), (2.0, 120.0), (1000.0, 3600.0)])
def test_keep_alive_by_reload_cost_within_its_bounds(make_world: MakeWorld, reload_s: float, kept_s: float) -> None:
    planner = ScriptedPlanner()
    planner.reloads_s = reload_s
    world = make_world(Agent("local"), settings=QUIET, planner=planner)
    world.connect("local")
    world.serve(spec("a", keep_alive_s=None))
    planner.then("a", place("local"))
    world.served("a", 0)
    world.pass_time(kept_s - 0.5)
    assert world.only("a").state is _I.READY
    world.pass_time(1.0)
    assert not world.view.instances


def test_of_too_many_the_longest_idle_goes(make_world: MakeWorld) -> None:
    planner = ScriptedPlanner()
    world = make_world(Agent("local", device_mib=100), settings=QUIET, planner=planner)
    world.connect("local")
    world.serve(spec("a", most=2))
    planner.then("a", place("local"), place("local"))
    world.demand("a", 8)
    first, second = world.view.instances_of("a").values()
    for one in (first, second):
        world.busy(one, 1)
    world.demand("a", 0, 2)
    world.busy(first, 0)
    world.pass_time(1.0)
    world.busy(second, 0)
    world.view.models["a"].spec = spec("a", most=1)
    world.demand("a", 0, 0)
    assert world.only("a") is second


# --- brought ahead ---


def prefetching(make_world: MakeWorld, *, arena_mib: int = 20, every_s: float = 2.0) -> World:
    world = make_world(
        Agent("n", kind="cuda", arena_mib=arena_mib, automatic=True), settings=ControlSettings(prefetch_every_s=every_s)
    )
    for name in "abcd":
        world.agents["n"].hold(name)
    world.connect("n")
    for name in "abcd":
        world.serve(spec(name, node="n"))
    return world


def test_the_hottest_come_first_and_only_into_what_is_free(make_world: MakeWorld) -> None:
    world = prefetching(make_world)
    for name, calls in (("b", 3), ("d", 5), ("a", 1)):
        for _ in range(calls):
            called(world.view.models[name], world.now, world.settings.heat_s)
    world.pass_time(60.0)
    agent = world.agents["n"]
    assert [one.digest for one in agent.heard if isinstance(one, LoadCheckpoint)] == [digest_of("d"), digest_of("b")]
    assert list(agent.dram) == [digest_of("d"), digest_of("b")]
    assert not agent.done, "acknowledged"
    assert not world.loop._core.prefetches
    world.check_rows()


def test_a_node_reads_one_ahead_at_a_time_however_long_it_takes(make_world: MakeWorld) -> None:
    world = prefetching(make_world, arena_mib=16)
    agent = world.agents["n"]
    agent.automatic = False
    world.pass_time(100.0)
    assert len(agent.ops) == 1
    world.tell("n", agent.finish(next(iter(agent.ops))))
    world.pass_time(100.0)
    assert len(agent.ops) == 1
    world.lose("n")
    assert not world.loop._core.prefetches


def test_nothing_is_brought_ahead_when_that_is_off(make_world: MakeWorld) -> None:
    world = prefetching(make_world, every_s=0.0)
    world.pass_time(100.0)
    assert not [one for one in world.agents["n"].heard if isinstance(one, LoadCheckpoint)]


def test_heat_counts_calls_and_decays(world: World) -> None:
    world.serve(spec())
    model = world.view.models["m"]
    for _ in range(2):
        called(model, 100.0, 50.0)
    assert heat(model, 100.0, 50.0) == 2.0
    assert heat(model, 150.0, 50.0) == pytest.approx(2.0 / 2.718281828)
    assert heat(model, 90.0, 50.0) == 2.0, "a clock set back heats nothing"


# --- remembered ---


def test_decisions_are_bounded_and_waits_are_not_repeated() -> None:
    log = Decisions(3)
    best = place("n").best
    refusal = Refusal({Rejection.BUSY_DEVICE: 1}, False, "full")
    for _ in range(5):
        log.add(1.0, "a", None, 1, refusal)
        log.add(1.0, "b", None, 1, Wait(1.0, best, {}, "soon"))
    assert [type(one.decision) for one in log] == [Refusal, Wait]
    log.add(2.0, "a", None, 1, Refusal({}, True, "never"))
    assert len(log) == 3
    log.add(3.0, "a", "i", 1, Plan(best, (), {}, "there"))
    log.add(4.0, "a", None, 1, refusal)
    assert [one.at for one in log] == [2.0, 3.0, 4.0]
    log.forget("a")
    log.add(5.0, "a", None, 1, refusal)
    assert len(log) == log.maxlen == 3
    assert [one.at for one in log][-1] == 5.0


# --- learned ---


def learning(make_world: MakeWorld) -> World:
    agent = Agent("n", kind="cuda")
    agent.phases = StartPhases(load_s=2.0, loaded_from=Tier.DISK, loaded_bytes=8 << 20, build_s=0.5, total_s=2.5)
    agent.hold("a")
    world = make_world(agent, settings=QUIET)
    world.connect("n")
    world.serve(spec("a", node="n"))
    agent.automatic = False
    world.demand("a", 1)
    return world


def test_an_outcome_stands_beside_its_estimate(make_world: MakeWorld) -> None:
    world = learning(make_world)
    world.pass_time(2.5)
    world.tell("n", world.agents["n"].become(world.only("a").id, _I.READY))
    (outcome,) = rows(world, OutcomeView)
    assert isinstance(outcome, OutcomeView)
    assert (outcome.kind, outcome.model, outcome.node, outcome.source, outcome.actual_s) == ("start", "a", "n", "disk", 2.5)
    assert 0.0 < outcome.estimated_s < 10.0
    assert rows(world, PutEstimate)
    assert not world.loop._core.estimates._records


@pytest.mark.parametrize("early", [False, True], ids=["starting", "ready before its last weights"])
@pytest.mark.parametrize("how", ["end", "stop", "lost"])
def test_a_start_that_ends_otherwise_leaves_no_load_behind(make_world: MakeWorld, how: str, early: bool) -> None:
    world = learning(make_world)
    instance = world.only("a")
    if early:
        world.agents["n"].phases = None
        world.tell("n", world.agents["n"].become(instance.id, _I.READY))
    estimates = world.loop._core.estimates
    assert set(estimates._records) == {instance.id}
    world.demand("a", 0)
    match how:
        case "end":
            world.tell("n", world.agents["n"].become(instance.id, _I.STOPPED))
        case "stop":
            world.ask(lambda ticket: StopInstanceNow(ticket, instance.id))
        case _:
            world.lose("n")
            world.pass_time(world.settings.unreachable_grace_s)
    assert not estimates._records
    assert not rows(world, OutcomeView)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_start_that_was_not_watched_from_its_begin_tells_no_outcome(make_world: MakeWorld, restarted: bool) -> None:
    world = learning(make_world)
    id_ = world.only("a").id
    if restarted:
        world.start_manager()
    else:
        world.lose("n")
    world.pass_time(30.0)
    world.agents["n"].become(id_, _I.READY)
    world.connect("n")
    assert world.only("a").state is _I.READY
    assert not rows(world, OutcomeView)


def test_prefills_teach_what_a_migration_takes(make_world: MakeWorld) -> None:
    world = learning(make_world)
    instance = world.only("a")
    world.tell("n", world.agents["n"].become(instance.id, _I.READY))
    estimates = world.loop._core.estimates
    before = estimates.migration_s(instance.digest, "cuda", 1000)
    for tokens in (100, 200, 400, 800, 1600) * 8:
        world.do(PrefillTimed(instance.id, tokens, 0.01 + tokens * 1e-4))
        world.pass_time(1.0)
    after = estimates.migration_s(instance.digest, "cuda", 1000)
    assert abs(after - 0.11) < abs(before - 0.11)
    assert after == pytest.approx(0.11, rel=0.5)
    outcomes = [one for one in rows(world, OutcomeView) if isinstance(one, OutcomeView) and one.kind == "prefill"]
    assert 3 <= len(outcomes) <= 5, "a few of them, not all"
    assert world.say(PrefillTimed("nobody", 10, 1.0)).changes == []

"""The planner: its cost against brute force, what it promises of memory, whom it never takes, and its rules one by one."""

from __future__ import annotations

from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings

from schema.states import InstanceState, Tier, TierState
from sllmctl.cluster.plans import Candidate, Plan, Refusal, Rejection, Wait
from sllmctl.cluster.records import HOLDING, LEAVING, Model, PlacementRecord
from sllmctl.planner import PlannerOptions
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities
from sllmctl.planner.prices import Prices
from sllmctl.planner.rooms import arena_deficit_bytes, ask, ground
from sllmctl.planner.victims import Exit, exits_on
from tests.examples import examples
from tests.sllmctl.planner.crowds import NOW, RULES, Crowd, crowds

MIGRATE = Abilities(migrate=True)
ROOMY = 1.04
"""What costs others less than 2 % of the start is as good as free: to choose devices, and again to make the cache larger."""


# --- against brute force ---


def _brute(crowd: Crowd, model: Model) -> list[tuple[float, float]]:
    """(start with the time until there is room, what others pay) of every set of devices with every set of those who may
    leave that makes room there."""
    view, estimates = crowd.view, Estimates(RULES)
    checkpoint = view.checkpoints["w-m"]
    asked = ask(model, checkpoint, RULES, NOW)
    prices = Prices(view, estimates, RULES, NOW)
    found: list[tuple[float, float]] = []
    for node in view.nodes.values():
        assert node.inventory is not None
        here = ground(view, node, asked)
        exits = exits_on(view, node, asked, prices, crowd.journals, RULES, devices=list(here.rooms))
        has = [tier for tier in (Tier.DRAM, Tier.DISK) if node.id in view.nodes_with("w-m", tier)]
        for devices in combinations(here.rooms, asked.count):
            own = all(index in here.own for index in devices)
            if not own and (not has or view.memory.arena_bytes_of(node.id, "w-m") > node.inventory.arena.budget_bytes):
                continue
            source = Tier.DEVICE if own else has[0]
            deficit = 0 if own else arena_deficit_bytes(view, node, "w-m")
            for size in range(len(exits) + 1):
                for leaving in combinations(exits, size):
                    if all(here.rooms[at] + sum(one.frees.get(at, 0) for one in leaving) >= asked.least for at in devices):
                        if deficit and _arena_freed(crowd, node.id, leaving) < deficit:
                            continue
                        room_s = max((one.room_s for one in leaving), default=0.0)
                        start = estimates.startup(node, checkpoint, devices, source, "", NOW + room_s)
                        found.append((room_s + start.total_s, sum(one.delay_s for one in leaving)))
    return found


def _arena_freed(crowd: Crowd, node: str, leaving: tuple[Exit, ...]) -> int:
    gone = {name for one in leaving for name in one.ids}
    here = [one for one in crowd.view.instances_on(node).values() if one.state in HOLDING]
    kept = {one.digest for one in here if one.id not in gone}
    return sum(crowd.view.memory.arena_bytes_of(node, digest) for digest in {one.digest for one in here} - kept)


@settings(max_examples=examples(300))
@given(crowds())
def test_the_cost_is_within_its_bound_of_brute_force(case: tuple[Crowd, Model]) -> None:
    crowd, model = case
    twin = _brute(crowd, model)
    found = crowd.planner().plan(model, NOW)
    if isinstance(found, Refusal):
        assert not twin
        return
    assert isinstance(found, Plan)
    assert twin
    factor = 2 * model.spec.devices + 3
    room = max(found.best.room_s, 0.0)
    assert found.best.cost_s <= min(ROOMY * start + factor * (delay + room) for start, delay in twin) + 1e-9
    # Of several instances of which one must stay, the twin knows only one choice of who may go.
    if all(other.spec.scale.min == 0 for other in crowd.view.models.values()):
        assert found.best.cost_s >= min(start for start, _ in twin) - 1e-9


@settings(max_examples=examples(200))
@given(crowds())
def test_what_is_explained_in_full_is_what_is_planned(case: tuple[Crowd, Model]) -> None:
    crowd, model = case
    planner = crowd.planner()
    found = planner.plan(model, NOW)
    assert crowd.planner().plan(model, NOW) == found
    decision, verdicts = planner.explain(model, NOW)
    assert [name for name, _ in verdicts] == list(crowd.view.nodes)
    if isinstance(found, Plan):
        assert isinstance(decision, Plan)
        assert decision.best.cost_s <= ROOMY * found.best.cost_s + 1e-9
        assert sum(found.rejected.values()) + 1 <= len(crowd.view.nodes)
    else:
        assert isinstance(decision, Refusal)
        assert sum(found.rejected.values()) == len(crowd.view.nodes)
        assert all(isinstance(verdict, Rejection) for _, verdict in verdicts)


# --- what is promised ---


def _carry_out(crowd: Crowd, best: Candidate) -> None:
    """The memory as it is when everybody who is to leave has left: the newcomer is there, and so are the targets."""
    view = crowd.view
    crowd.runs("new", "m", best.node, best.devices, kv=best.working_bytes)
    gone = {*best.stops, *best.drains, *(move.instance for move in best.moves)}
    gone |= {one.id for one in view.instances.values() if one.state in LEAVING}
    for move in best.moves:
        if not move.target:
            source = view.instances[move.instance]
            crowd.runs(f"target-{move.instance}", source.model, move.node, move.devices, kv=move.working_bytes)
    for name in gone:
        one = view.instances[name]
        if all(other.digest != one.digest or other.id in gone for other in view.instances_on(one.node).values()):
            for record in list(view.placements_at(one.digest, one.node).values()):
                if record.tier is Tier.DEVICE:
                    crowd.lies(one.model, one.node, Tier.DEVICE, record.device, size=record.size_bytes)
        view.drop_instance(one)
    for node, drops in [(best.node, best.drops), *((move.node, move.drops) for move in best.moves)]:
        for digest in drops:
            records = [one for one in view.placements_at(digest, node).values() if one.tier is Tier.DEVICE]
            assert not any(one.state in HOLDING and one.digest == digest for one in view.instances_on(node).values())
            for record in records:
                view.drop_placement(record.key)


def _check_memory(crowd: Crowd, best: Candidate) -> None:
    view = crowd.view
    for node, devices in [(best.node, best.devices), *((move.node, move.devices) for move in best.moves)]:
        inventory = view.nodes[node].inventory
        assert inventory is not None
        for device in inventory.devices:
            if device.index in devices:
                assert view.memory.free_bytes(node, device) >= 0
        sources = [best.source] if node == best.node else []
        sources += [move.source for move in best.moves if move.node == node and not move.target]
        if Tier.DEVICE not in sources:
            assert view.memory.arena_held_bytes.get(node, 0) <= inventory.arena.budget_bytes


def _check_victims(crowd: Crowd, model: Model, best: Candidate) -> None:
    view = crowd.view
    for name in best.stops:
        one = view.instances[name]
        assert (one.state, one.running, one.node) == (InstanceState.READY, 0, best.node)
        assert one.model != model.name
        assert one.idle_since is not None
        assert NOW - one.idle_since >= (RULES.evict_idle_s if one.served else RULES.unserved_s)
    for name in (*best.drains, *(move.instance for move in best.moves)):
        one = view.instances[name]
        assert (one.state, one.node, one.served) == (InstanceState.READY, best.node, True)
        assert one.model != model.name
        assert one.running
    aged = model.waiting_since is not None and NOW - model.waiting_since >= RULES.age_s
    for name in best.drains:
        one = view.instances[name]
        assert aged or (crowd.journals.remaining_s(name) > 0 and one.ready_at == NOW - 500.0)
    for other in view.models.values():
        ended = [name for name in (*best.stops, *best.drains) if view.instances[name].model == other.name]
        there = [one for one in view.instances_of(other.name).values() if one.state in HOLDING - LEAVING]
        assert not ended or len(there) - len(ended) >= other.spec.scale.min


@settings(max_examples=examples(300))
@given(crowds())
def test_memory_is_never_promised_twice_and_victims_are_fair(case: tuple[Crowd, Model]) -> None:
    crowd, model = case
    found = crowd.planner().plan(model, NOW)
    if isinstance(found, Plan):
        _check_victims(crowd, model, found.best)
        _carry_out(crowd, found.best)
        _check_memory(crowd, found.best)


@settings(max_examples=examples(300))
@given(crowds(roomy_arena=True))
def test_migrations_have_targets_with_room_and_are_chosen_only_if_better(case: tuple[Crowd, Model]) -> None:
    crowd, model = case
    without, found = crowd.planner().plan(model, NOW), crowd.planner(MIGRATE).plan(model, NOW)
    assert crowd.planner(MIGRATE).plan(model, NOW) == found
    if isinstance(found, Refusal):
        assert isinstance(without, Refusal)
        return
    assert isinstance(found, Plan)
    if isinstance(without, Plan):
        assert found.best.cost_s <= ROOMY * without.best.cost_s + 1e-9
    _check_victims(crowd, model, found.best)
    victims = [move.instance for move in found.best.moves]
    assert len(set(victims)) == len(victims)
    taken: dict[str, int] = {}
    for move in found.best.moves:
        source = crowd.view.instances[move.instance]
        if move.target:
            target = crowd.view.instances[move.target]
            assert (target.model, target.state, target.node) == (source.model, InstanceState.READY, move.node)
            assert target.id not in {*victims, *found.best.stops, *found.best.drains}
            taken[target.id] = taken.get(target.id, target.running) + source.running
            assert taken[target.id] <= crowd.view.models[source.model].spec.scale.max_concurrency
        else:
            assert move.node != found.best.node or not set(move.devices) & set(found.best.devices)
            checkpoint = crowd.view.checkpoints[source.digest]
            assert move.working_bytes * len(move.devices) >= sum(crowd.journals.tokens(source.id)) * checkpoint.kv_token_bytes
        assert found.best.room_s >= move.ready_s + move.migrate_s - 1e-9
    _carry_out(crowd, found.best)
    _check_memory(crowd, found.best)


# --- rules ---


def _one_device(size: int = 20, *, kind: str = "cuda") -> Crowd:
    crowd = Crowd()
    crowd.node("n0", [size], kind=kind)
    for name in ("a", "m"):
        crowd.model(name, 10)
        crowd.lies(name, "n0", Tier.DRAM)
    return crowd


def test_weights_on_the_device_come_before_dram_and_disk() -> None:
    crowd = Crowd()
    model = crowd.model("m", 10)
    for name, tier in (("n0", Tier.DISK), ("n1", Tier.DRAM), ("n2", Tier.DEVICE)):
        crowd.node(name, [20])
        crowd.lies("m", name, tier)
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Plan)
    assert [(one.node, one.source) for one in (found.best, *found.others)] == [("n2", Tier.DEVICE)]
    assert found.rejected == {Rejection.SLOWER: 2}
    decision, _ = crowd.planner().explain(model, NOW)
    assert isinstance(decision, Plan)
    assert [(one.node, one.source) for one in (decision.best, *decision.others)] == [
        ("n2", Tier.DEVICE), ("n1", Tier.DRAM), ("n0", Tier.DISK),
    ]  # fmt: skip


@pytest.mark.parametrize(("short_s", "node", "kv_bytes"), [(0.0, "n0", 2), (2.0, "n0", 2), (20.0, "n1", 8)])
def test_a_short_cache_is_taken_only_if_what_it_saves_is_worth_it(short_s: float, node: str, kv_bytes: int) -> None:
    crowd = Crowd()
    crowd.node("n0", [24])
    crowd.node("n1", [24])
    crowd.model("a", 10)
    model = crowd.model("m", 10)
    crowd.runs("busy", "a", "n0", kv=2, tokens=(9,))
    crowd.lies("m", "n0", Tier.DRAM)
    crowd.lies("m", "n1", Tier.DISK)
    planner = crowd.planner(settings=msgspec.structs.replace(RULES, kv_short_s=short_s))
    found = planner.plan(model, NOW)
    assert isinstance(found, Plan)
    assert (found.best.node, found.best.working_bytes) == (node, kv_bytes)
    explained, _ = planner.explain(model, NOW)
    assert isinstance(explained, Plan)
    assert explained.best.node == node


def test_a_start_from_the_device_needs_no_dram() -> None:
    crowd = Crowd()
    model = crowd.model("m", 10)
    crowd.node("n0", [20], arena=5)
    crowd.lies("m", "n0", Tier.DISK)
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Refusal)
    assert found.rejected == {Rejection.SMALL_ARENA: 1}
    assert found.reason.endswith("1 node with a DRAM budget below the weights; raise node.arena_bytes: the weights take 1 MiB")
    crowd.lies("m", "n0", Tier.DEVICE)
    assert isinstance(crowd.planner().plan(model, NOW), Plan)


def test_weights_that_nobody_calls_are_dropped_before_those_in_demand() -> None:
    crowd = _one_device(34)
    crowd.model("b", 10, heat=3.0)
    crowd.model("c", 10)
    for name in ("b", "c"):
        crowd.lies(name, "n0", Tier.DEVICE)
    crowd.lies("a", "n0", Tier.DEVICE)
    crowd.view.models["a"].heat, crowd.view.models["a"].heat_at = 2.0, NOW
    found = crowd.planner().plan(crowd.view.models["m"], NOW)
    assert isinstance(found, Plan)
    assert (found.best.drops, found.best.delay_s, found.best.room_s) == (("w-c",), 0.0, 0.0)


@pytest.mark.parametrize(
    ("served", "idle_s", "least", "goes"),
    [(True, 5.0, 0, True), (True, 0.5, 0, False), (False, 5.0, 0, False), (False, 11.0, 0, True), (True, 5.0, 1, False)],
)
def test_only_those_go_that_have_served_and_rest_above_their_minimum(
    served: bool, idle_s: float, least: int, goes: bool
) -> None:
    crowd = Crowd()
    crowd.node("n0", [20])
    model = crowd.model("m", 10)
    crowd.model("a", 10, least=least)
    crowd.lies("m", "n0", Tier.DRAM)
    crowd.runs("old", "a", "n0", idle_s=idle_s, served=served)
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Plan) is goes
    if isinstance(found, Plan):
        assert (found.best.stops, found.best.drops) == (("old",), ("w-a",))
    else:
        assert found.rejected == {Rejection.BUSY_DEVICE: 1}


@pytest.mark.parametrize(
    ("waited_s", "remaining", "ready_s", "goes"),
    [(20.0, 0.0, 1.0, True), (1.0, 4.0, 500.0, True), (1.0, 0.0, 500.0, False), (1.0, 4.0, 1.0, False)],
)
def test_the_busy_drain_for_requests_that_aged_or_when_their_end_is_known(
    waited_s: float, remaining: float, ready_s: float, goes: bool
) -> None:
    crowd = _one_device()
    crowd.runs("old", "a", "n0", tokens=(9,), remaining=remaining, ready_s=ready_s)
    model = crowd.view.models["m"]
    model.waiting, model.waiting_since = 1, NOW - waited_s
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Plan) is goes
    if isinstance(found, Plan):
        assert found.best.drains == ("old",)
        assert found.best.room_s == (remaining or RULES.drain_longest_s)


def test_room_that_is_on_its_way_is_reserved_once() -> None:
    crowd = _one_device()
    crowd.runs("old", "a", "n0", state=InstanceState.DRAINING, tokens=(9,), remaining=3.0)
    model = crowd.view.models["m"]
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Plan)
    assert (found.best.room_s, found.best.stops, found.best.drains, found.best.drops) == (3.0, (), (), ("w-a",))
    crowd.runs("next", "m", "n0", state=InstanceState.PLANNED)
    again = crowd.planner().plan(model, NOW)
    assert isinstance(again, Refusal)
    assert not again.hopeless


@pytest.mark.parametrize(("grace_s", "room_s"), [(None, RULES.drain_s - 4.0), (50.0, 46.0), (3.0, 0.0)])
def test_one_that_drains_is_gone_when_its_grace_has_run_out(grace_s: float | None, room_s: float) -> None:
    crowd = _one_device()
    old = crowd.runs("old", "a", "n0", state=InstanceState.DRAINING, tokens=(9,), remaining=500.0)
    old.grace_s, old.life_at = grace_s, NOW - 4.0
    found = crowd.planner().plan(crowd.view.models["m"], NOW)
    assert isinstance(found, Plan)
    assert found.best.room_s == room_s


@pytest.mark.parametrize("tokens", [(9,), ()])
def test_one_that_goes_elsewhere_already_gives_its_room_to_nobody_else(tokens: tuple[int, ...]) -> None:
    crowd = _one_device()
    crowd.node("n1", [30])
    crowd.lies("a", "n1", Tier.DRAM)
    old = crowd.runs("old", "a", "n0", tokens=tokens, idle_s=None if tokens else 50.0, remaining=4.0)
    model = crowd.view.models["m"]
    assert isinstance(crowd.planner(MIGRATE).plan(model, NOW), Plan)
    old.moving = True
    assert isinstance(crowd.planner(MIGRATE).plan(model, NOW), Refusal)


def test_it_waits_while_waiting_is_cheaper_and_for_the_aged_counts_only_their_own_time() -> None:
    crowd = _one_device()
    crowd.view.models["a"].heat, crowd.view.models["a"].heat_at = 3.0, NOW
    crowd.runs("old", "a", "n0", idle_s=5.0)
    model = crowd.view.models["m"]
    planner = crowd.planner()
    plan = planner.plan(model, NOW)
    assert isinstance(plan, Plan)
    between = (plan.best.startup_s + plan.best.cost_s) / 2
    assert plan.best.startup_s < between < plan.best.cost_s
    wait = planner.plan(model, NOW, wait_s=between)
    assert isinstance(wait, Wait)
    assert wait.best == plan.best
    assert planner.plan(model, NOW, wait_s=plan.best.cost_s + 1) == plan
    model.waiting_since = NOW - RULES.age_s
    assert isinstance(planner.plan(model, NOW, wait_s=between), Plan)


def test_a_victim_larger_than_the_need_migrates_and_its_target_is_found() -> None:
    crowd = Crowd()
    crowd.node("n0", [20])
    crowd.node("n1", [20])
    model = crowd.model("m", 6)
    crowd.model("a", 14)
    crowd.lies("m", "n0", Tier.DRAM)
    crowd.lies("a", "n1", Tier.DRAM)
    crowd.runs("old", "a", "n0", kv=4, tokens=(2, 1))
    assert isinstance(crowd.planner().plan(model, NOW), Refusal)
    found = crowd.planner(MIGRATE).plan(model, NOW)
    assert isinstance(found, Plan)
    (move,) = found.best.moves
    assert (move.instance, move.node, move.devices, move.target, move.source) == ("old", "n1", (0,), "", Tier.DRAM)
    assert found.best.drops == ("w-a",)
    assert found.best.room_s == pytest.approx(move.ready_s + move.migrate_s)
    assert found.best.delay_s == pytest.approx(2 * move.pause_s)
    assert "migrates 1 busy instance" in found.reason


def test_several_victims_do_not_take_the_same_room() -> None:
    crowd = Crowd()
    crowd.node("n0", [24])
    crowd.node("n1", [12])
    model = crowd.model("m", 20)
    crowd.lies("m", "n0", Tier.DRAM)
    for name in ("a", "b"):
        crowd.model(name, 8)
        crowd.lies(name, "n1", Tier.DRAM)
        crowd.runs(f"old-{name}", name, "n0", kv=2, tokens=(2,))
    assert isinstance(crowd.planner(MIGRATE).plan(model, NOW), Refusal)
    crowd.node("n2", [12])
    crowd.lies("b", "n2", Tier.DISK)
    found = crowd.planner(MIGRATE).plan(model, NOW)
    assert isinstance(found, Plan)
    assert {(move.instance, move.node) for move in found.best.moves} == {("old-a", "n1"), ("old-b", "n2")}


def test_it_fetches_from_a_peer_where_nodes_can() -> None:
    crowd = Crowd()
    crowd.node("n0", [4])
    crowd.node("n1", [20])
    model = crowd.model("m", 10)
    crowd.lies("m", "n0", Tier.DRAM)
    assert isinstance(crowd.planner().plan(model, NOW), Refusal)
    found = crowd.planner(Abilities(fetch=True)).plan(model, NOW)
    assert isinstance(found, Plan)
    assert (found.best.node, found.best.source, found.best.peer) == ("n1", Tier.REMOTE, "n0")
    assert "weights from n0" in found.reason


def test_without_locality_the_roomiest_wins_and_without_sharing_a_device_is_ones_own() -> None:
    crowd = Crowd()
    model = crowd.model("m", 10)
    crowd.model("a", 2)
    crowd.node("n0", [20])
    crowd.node("n1", [30])
    crowd.lies("m", "n0", Tier.DRAM)
    crowd.lies("m", "n1", Tier.DISK)
    here = crowd.planner().plan(model, NOW)
    assert isinstance(here, Plan)
    assert here.best.node == "n0"
    blind = crowd.planner(options=PlannerOptions(locality=False)).plan(model, NOW)
    assert isinstance(blind, Plan)
    assert (blind.best.node, blind.best.source) == ("n1", Tier.DISK)
    crowd.runs("other", "a", "n0", tokens=(1,))
    alone = crowd.planner(options=PlannerOptions(sharing=False)).plan(model, NOW)
    assert isinstance(alone, Plan)
    assert alone.best.node == "n1"


def test_a_reload_takes_what_the_fastest_tier_that_has_it_takes() -> None:
    crowd = _one_device()
    model, planner = crowd.view.models["m"], crowd.planner()
    from_dram = planner.reload_s(model, NOW)
    assert from_dram == pytest.approx(1.0)
    crowd.lies("m", "n0", Tier.DEVICE)
    assert planner.reload_s(model, NOW) == pytest.approx(RULES.start_base_s)
    crowd.view.nodes["n0"].imports_since = NOW - 1.0
    assert planner.reload_s(model, NOW) == pytest.approx(RULES.start_base_s), "its node can fork long before that"


def test_a_node_where_the_model_was_just_given_up_counts_as_farther() -> None:
    crowd = Crowd()
    model = crowd.model("m", 10)
    for name in ("n0", "n1"):
        crowd.node(name, [30])
        crowd.lies("m", name, Tier.DISK)
    crowd.lies("m", "n0", Tier.DRAM)
    planner = crowd.planner()

    def best(now: float) -> Candidate:
        found = planner.plan(model, now)
        assert isinstance(found, Plan)
        assert ("given up there" in found.reason) == (found.best.risk_s > 0)
        return found.best

    assert best(NOW).node == "n0"
    model.avoided["n0"] = NOW + 60.0
    assert (best(NOW).node, best(NOW).risk_s) == ("n1", 0.0)
    assert best(NOW + 61.0).node == "n0", "not for ever"
    model.avoided["n1"] = NOW + 60.0
    again = best(NOW)
    assert (again.node, again.cost_s) == ("n0", pytest.approx(again.startup_s + RULES.failed_cost_s))


def test_a_copy_in_quarantine_is_said() -> None:
    crowd = Crowd()
    model = crowd.model("m", 10)
    crowd.node("n0", [20])
    crowd.view.put_placement(PlacementRecord("w-m", "n0", Tier.DISK, 0, TierState.QUARANTINED, 10))
    found = crowd.planner().plan(model, NOW)
    assert isinstance(found, Refusal)
    assert found.reason == (
        "no node can hold model 'm': 1 node without the checkpoint; "
        "the copy on n0 is in quarantine: `sllmctl checkpoint show m` says why"
    )


def test_no_node_at_all_is_said() -> None:
    crowd = Crowd()
    found = crowd.planner().plan(crowd.model("m", 10), NOW)
    assert isinstance(found, Refusal)
    assert found.hopeless
    assert found.reason == "no node can hold model 'm': there is no node"

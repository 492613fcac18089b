"""Migrations: their cost against brute force over victims and targets, capacity as it is consumed, rounds, and each rule."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.states import InstanceState, Tier
from sllmctl.cluster.plans import Move, Plan, Refusal
from sllmctl.cluster.records import Model
from sllmctl.planner import moves as moves_module
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities
from sllmctl.planner.rounds import rounds_s
from tests.examples import examples
from tests.sllmctl.planner.crowds import NOW, RULES, Crowd
from tests.sllmctl.planner.straits import WIDE, Twin, straits

MIGRATE = Abilities(migrate=True)


# --- against brute force ---


def _compare(crowd: Crowd) -> None:
    twin = Twin(crowd)
    costs = list(twin.costs())
    found = crowd.planner(MIGRATE, settings=WIDE).plan(crowd.view.models["m"], NOW)
    if isinstance(found, Refusal):
        assert not costs
        return
    assert isinstance(found, Plan)
    twin.check(found.best)
    if costs:
        # A place whose room costs less than a fiftieth of its start is taken without a look at the busy.
        assert found.best.cost_s <= min(1.02 * start_s + room_s for start_s, room_s in costs) + 1e-6
    if all(one.running and one.state is InstanceState.READY for one in crowd.view.instances.values()):
        assert found.best.cost_s >= min(start_s + room_s for start_s, room_s in costs) - 1e-6


@settings(max_examples=examples(80))
@given(straits())
def test_no_choice_of_victims_and_targets_is_cheaper(crowd: Crowd) -> None:
    _compare(crowd)


@pytest.mark.slow
@settings(max_examples=examples(1000))
@given(straits())
def test_no_choice_is_cheaper_in_many_clusters(crowd: Crowd) -> None:
    _compare(crowd)


@settings(max_examples=examples(80))
@given(straits())
def test_what_was_left_out_at_first_is_looked_at_again_where_it_might_be_better(crowd: Crowd) -> None:
    model = crowd.view.models["m"]
    found = crowd.planner(MIGRATE, settings=WIDE).plan(model, NOW)
    with patch.object(moves_module, "_BEAMS", (1, 512)):
        again = crowd.planner(MIGRATE, settings=WIDE).plan(model, NOW)
    assert isinstance(found, Plan) is isinstance(again, Plan)
    if isinstance(found, Plan) and isinstance(again, Plan):
        assert again.best.cost_s == pytest.approx(found.best.cost_s)


# --- rounds ---


def _simulated(tokens: Sequence[int], token_s: float, base_s: float, nearly: float = 0.0) -> tuple[float, float]:
    """The rounds step by step: the target computes gap after gap, each sequence at the source makes a token per step.
    ``nearly`` moves the rules by which they end, since gaps that are just on one may be taken either way."""
    step_s = 10 * token_s
    clock = 0.0
    has, computed = [float(one) for one in tokens], [0.0] * len(tokens)
    before = float("inf")
    for _ in range(6):
        gaps = [there - done for there, done in zip(has, computed, strict=True)]
        if max(gaps) <= 16 + nearly or sum(gaps) > (0.9 - nearly) * before:
            break
        before = sum(gaps)
        goals = list(has)
        for at, gap in enumerate(gaps):
            spent_s = gap * token_s + base_s
            clock += spent_s
            has = [one + spent_s / step_s for one in has]
            computed[at] = goals[at]
    stopped, waits = clock, []
    for there, done in zip(has, computed, strict=True):
        clock += (there - done) * token_s + base_s
        waits.append(clock - stopped)
    return clock, sum(waits) / len(waits)


@settings(max_examples=examples(100))
@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=16),
    st.sampled_from([1e-4, 1e-3, 1e-2]),
    st.sampled_from([0.001, 0.01, 0.05]),
)
def test_the_rounds_take_what_their_steps_take(tokens: list[int], token_s: float, base_s: float) -> None:
    estimates = Estimates(msgspec.structs.replace(RULES, prefill_token_s=token_s, prefill_base_s=base_s))
    migrate_s, pause_s = rounds_s(estimates, "d", "cuda", tokens)
    either = [_simulated(tokens, token_s, base_s, nearly) for nearly in (-1e-6, 1e-6)]
    assert max(tokens) <= 16 or any((migrate_s, pause_s) == pytest.approx(one, rel=0.01) for one in either)
    assert 0.0 < pause_s <= migrate_s
    if max(tokens) <= 16:
        assert migrate_s == pytest.approx(_simulated(tokens, token_s, base_s)[0])


def test_one_long_sequence_moves_in_rounds_of_a_tenth() -> None:
    estimates = Estimates(msgspec.structs.replace(RULES, prefill_token_s=0.001, prefill_base_s=0.0))
    migrate_s, pause_s = rounds_s(estimates, "d", "cuda", (1000,))
    assert migrate_s == pytest.approx(1.0 + 0.1 + 0.01)
    assert pause_s == pytest.approx(0.01)


def test_many_sequences_catch_up_as_fast_as_they_are_computed() -> None:
    estimates = Estimates(msgspec.structs.replace(RULES, prefill_token_s=0.001, prefill_base_s=0.0))
    migrate_s, pause_s = rounds_s(estimates, "d", "cuda", (100,) * 10)
    assert migrate_s == pytest.approx(1.0 + 1.0)
    assert pause_s == pytest.approx((1 + 10) / 2 * 0.1)


# --- rules ---


def _full(*, tokens: tuple[int, ...] = (10,), size: int = 200) -> tuple[Crowd, Model]:
    """The newcomer fits on the only device of n0 alone, if a busy instance of "a" leaves it."""
    crowd = Crowd()
    crowd.node("n0", [size])
    model = crowd.model("m", 100)
    crowd.model("a", 100)
    crowd.lies("m", "n0", Tier.DRAM)
    crowd.runs("old", "a", "n0", kv=20, tokens=tokens, ready_s=2.0).kv_capacity_tokens = 20
    return crowd, model


def _moves(crowd: Crowd, model: Model) -> list[Move] | None:
    found = crowd.planner(MIGRATE, settings=WIDE).plan(model, NOW)
    if isinstance(found, Refusal):
        return None
    assert isinstance(found, Plan)
    Twin(crowd).check(found.best)
    return list(found.best.moves)


def _roomy(crowd: Crowd, node: str, size: int = 200, *, tier: Tier = Tier.DRAM, model: str = "a", arena: int = 10_000) -> None:
    crowd.node(node, [size], arena=arena)
    crowd.lies(model, node, tier)


@pytest.mark.parametrize("why", ["", "unserved", "moving", "draining", "no journal", "undeployed weights"])
def test_only_served_ready_instances_with_journals_that_stay_are_victims(why: str) -> None:
    crowd, model = _full()
    _roomy(crowd, "n1")
    old = crowd.view.instances["old"]
    if why == "unserved":
        old.served = False
    elif why == "moving":
        old.moving = True
    elif why == "draining":
        crowd.view.set_state(old, InstanceState.DRAINING)
    elif why == "no journal":
        crowd.journals.sequences["old"] = ()
    elif why == "undeployed weights":
        # Its model has other weights since; tokens cannot go on with those.
        crowd.view.set_digest(crowd.view.models["a"], "w-m")
    moves = _moves(crowd, model)
    assert not moves if why else moves is not None and [move.instance for move in moves] == ["old"]


def test_a_ready_target_takes_only_what_its_concurrency_and_memory_hold() -> None:
    for running, capacity, fits in (((1, 1), 40, True), ((1, 1, 1), 40, True), ((1, 1, 1, 1), 40, False), ((31,), 40, False)):
        crowd, model = _full()
        crowd.node("n1", [120])
        crowd.runs("host", "a", "n1", kv=20, tokens=running).kv_capacity_tokens = capacity
        moves = _moves(crowd, model)
        assert (moves is not None) is fits
        assert not moves or [(move.target, move.ready_s) for move in moves] == [("host", 0.0)]


@pytest.mark.parametrize("leaves", ["moving", "draining"])
def test_a_ready_target_keeps_room_for_those_that_come_to_it_already(leaves: str) -> None:
    crowd, model = _full()
    for node in ("n1", "n2"):
        crowd.node(node, [120])
    crowd.runs("host", "a", "n1", kv=20, tokens=(1,)).kv_capacity_tokens = 20
    other = crowd.runs("other", "a", "n2", kv=20, tokens=(10,))
    assert _moves(crowd, model)
    if leaves == "moving":
        other.moving = True
    else:
        crowd.view.set_state(other, InstanceState.DRAINING)
    assert _moves(crowd, model) is None


def test_an_instance_that_moves_itself_is_no_target() -> None:
    crowd, model = _full()
    crowd.node("n1", [120])
    host = crowd.runs("host", "a", "n1", kv=20, tokens=(1,))
    assert _moves(crowd, model)
    host.moving = True
    assert _moves(crowd, model) is None


def test_a_victim_leaves_the_ready_target_to_one_that_can_go_nowhere_else() -> None:
    crowd = Crowd()
    crowd.node("n0", [25, 25], kind="cpu")
    crowd.node("n1", [20], kind="cpu")
    crowd.node("n2", [12], kind="cpu")
    model = crowd.model("m", 300, devices=2)
    crowd.model("a", 100)
    for name, node in (("m", "n0"), ("a", "n2")):
        crowd.lies(name, node, Tier.DRAM)
    crowd.runs("small", "a", "n0", (0,), kv=20, tokens=(1,), ready_s=2.0).kv_capacity_tokens = 20
    crowd.runs("large", "a", "n0", (1,), kv=20, tokens=(18,), ready_s=2.0).kv_capacity_tokens = 20
    crowd.runs("host", "a", "n1", kv=20, tokens=(2,)).kv_capacity_tokens = 20
    moves = _moves(crowd, model)
    assert moves is not None
    assert {(move.instance, move.node, move.target) for move in moves} == {("small", "n2", ""), ("large", "n1", "host")}


def test_room_on_one_node_is_shared_out_so_that_all_fit() -> None:
    crowd = Crowd()
    crowd.node("n0", [260])
    crowd.node("n1", [70, 130])
    model = crowd.model("m", 240)
    for name, size in (("a", 50), ("b", 100)):
        crowd.model(name, size)
        crowd.lies(name, "n1", Tier.DRAM)
        crowd.runs(f"old-{name}", name, "n0", kv=20, tokens=(10,), ready_s=2.0)
    crowd.lies("m", "n0", Tier.DRAM)
    moves = _moves(crowd, model)
    assert moves is not None
    assert {(move.instance, move.devices) for move in moves} == {("old-a", (0,)), ("old-b", (1,))}
    # Two loads share the node's channels: each is counted as done when both are.
    assert {move.ready_s for move in moves} == {1.5}


def test_weights_on_the_device_are_used_where_another_device_has_more_room() -> None:
    crowd, model = _full()
    crowd.node("n1", [130, 220])
    crowd.lies("a", "n1", Tier.DEVICE, 0)
    moves = _moves(crowd, model)
    assert moves is not None
    assert [(move.devices, move.source, move.drops) for move in moves] == [((0,), Tier.DEVICE, ())]
    assert moves[0].ready_s == WIDE.start_base_s


def test_idle_weights_that_one_victim_starts_from_are_not_dropped_for_another() -> None:
    crowd = Crowd()
    crowd.node("n0", [260])
    crowd.node("n1", [125])
    model = crowd.model("m", 240)
    for name in ("a", "b"):
        crowd.model(name, 100)
        crowd.runs(f"old-{name}", name, "n0", kv=20, tokens=(10,), ready_s=2.0)
    for name, node in (("m", "n0"), ("b", "n1")):
        crowd.lies(name, node, Tier.DRAM)
    crowd.lies("a", "n1", Tier.DEVICE)
    assert _moves(crowd, model) is None
    _roomy(crowd, "n2", 120, model="b")
    moves = _moves(crowd, model)
    assert moves is not None
    assert {(move.instance, move.node, move.drops) for move in moves} == {("old-a", "n1", ()), ("old-b", "n2", ())}


def test_idle_weights_displaced_at_a_target_are_paid_for() -> None:
    crowd, model = _full()
    _roomy(crowd, "n1", 240)
    for name, heat in (("x", 2.0), ("y", 0.3)):
        crowd.model(name, 110, heat=heat)
        crowd.lies(name, "n1", Tier.DEVICE)
        crowd.lies(name, "n1", Tier.DRAM)
    found = crowd.planner(MIGRATE, settings=WIDE).plan(model, NOW)
    assert isinstance(found, Plan)
    (move,) = found.best.moves
    assert move.drops == ("w-y",)
    assert found.best.delay_s == pytest.approx(move.pause_s + (1 - exp(-0.3)) * 1.1)


def test_weights_in_use_on_a_target_node_are_not_dropped() -> None:
    crowd, model = _full()
    crowd.node("n1", [120, 130])
    crowd.model("x", 110)
    crowd.lies("a", "n1", Tier.DRAM)
    crowd.lies("x", "n1", Tier.DEVICE, 0)
    assert _moves(crowd, model)
    crowd.runs("user", "x", "n1", (1,), kv=10, tokens=(1,), served=False)
    assert _moves(crowd, model) is None


def test_the_dram_of_a_target_node_is_consumed_as_it_is_assigned() -> None:
    for arena, fits in ((200, True), (199, False)):
        crowd = Crowd()
        crowd.node("n0", [260])
        crowd.node("n1", [260], arena=arena)
        model = crowd.model("m", 240)
        crowd.lies("m", "n0", Tier.DRAM)
        for name in ("a", "b"):
            crowd.model(name, 100)
            crowd.lies(name, "n1", Tier.DISK)
            crowd.runs(f"old-{name}", name, "n0", kv=20, tokens=(10,), ready_s=2.0)
        moves = _moves(crowd, model)
        assert (moves is not None) is fits


def test_a_victim_may_go_to_another_device_of_its_own_node_but_not_the_newcomers() -> None:
    crowd = Crowd()
    crowd.node("n0", [200, 110])
    model = crowd.model("m", 150)
    crowd.model("a", 90)
    for name in ("m", "a"):
        crowd.lies(name, "n0", Tier.DRAM)
    crowd.runs("old", "a", "n0", (0,), kv=15, tokens=(10,), ready_s=2.0)
    moves = _moves(crowd, model)
    assert moves is not None
    assert [(move.node, move.devices, move.source) for move in moves] == [("n0", (1,), Tier.DRAM)]


def test_a_victim_on_two_devices_makes_room_on_one() -> None:
    crowd = Crowd()
    crowd.node("n0", [120, 120])
    crowd.node("n1", [120])
    crowd.node("n2", [120, 70])
    model = crowd.model("m", 90)
    crowd.model("a", 100, devices=2)
    crowd.lies("m", "n0", Tier.DRAM)
    for node in ("n1", "n2"):
        crowd.lies("a", node, Tier.DRAM)
    crowd.runs("old", "a", "n0", (0, 1), kv=15, tokens=(10, 10), ready_s=2.0)
    moves = _moves(crowd, model)
    assert moves is not None
    (move,) = moves
    assert (move.node, move.devices) == ("n2", (0, 1))
    assert move.working_bytes == 20


def test_nobody_moves_where_it_would_cost_more_than_what_others_leave() -> None:
    crowd, model = _full(size=240)
    _roomy(crowd, "n1", tier=Tier.DISK)
    crowd.model("x", 80, heat=0.3)
    crowd.lies("x", "n0", Tier.DEVICE)
    crowd.lies("x", "n0", Tier.DRAM)
    found = crowd.planner(MIGRATE, settings=WIDE).plan(model, NOW)
    assert isinstance(found, Plan)
    assert (found.best.drops, found.best.moves) == (("w-x",), ())

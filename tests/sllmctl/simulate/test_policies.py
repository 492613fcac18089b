"""Where the baselines put an instance: drawn evenly from what has room, or the soonest place, by preemption if need be."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from schema.errors import InvalidInput
from schema.states import InstanceState, Tier
from sllmctl.cluster.plans import Candidate, Plan, Refusal
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import NoJournals, Planner
from sllmctl.simulate.policies import POLICIES, policy_named
from tests.sllmctl.planner.crowds import NOW, RULES, Crowd, Told


class Histories(Told):
    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, int] = {}

    def resumed(self, instance: str) -> int:
        return self.before.get(instance, 0)


def crowd(nodes: int = 2, devices: int = 2, size: int = 20) -> tuple[Crowd, Histories]:
    made = Crowd()
    histories = Histories()
    made.journals = histories
    for number in range(nodes):
        made.node(f"n{number}", [size] * devices)
    return made, histories


def planner(made: Crowd, name: str, seed: int = 1) -> Planner:
    policy = POLICIES[name]
    return policy.make(made.view, Estimates(RULES), made.journals, RULES, policy.abilities, Random(seed))


def best(decision: object) -> Candidate:
    assert isinstance(decision, Plan)
    return decision.best


def test_random_draws_places_evenly() -> None:
    made, _ = crowd(nodes=3, devices=2)
    made.model("busy", 15)
    made.runs("i1", "busy", "n0", (0,), tokens=(5,))
    wanted = made.model("new", 10)
    made.lies("new", "n2", Tier.DISK)
    drawn = planner(made, "random")
    places: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for _ in range(2000):
        found = best(drawn.plan(wanted, NOW))
        places[found.node, found.devices] += 1
        assert found.source is (Tier.DISK if found.node == "n2" else Tier.REMOTE)
    assert ("n0", (0,)) not in places
    assert len(places) == 5
    assert all(300 < count < 500 for count in places.values())


def test_random_takes_idle_weights_and_resting_instances_for_room() -> None:
    made, _ = crowd(nodes=1, devices=3)
    for name in ("resting", "idle", "busy"):
        made.model(name, 15)
    made.runs("i1", "resting", "n0", (0,), idle_s=100.0)
    made.lies("idle", "n0", Tier.DEVICE, 1)
    made.runs("i2", "busy", "n0", (2,), tokens=(5,))
    wanted = made.model("new", 10)
    found = [best(planner(made, "random", seed).plan(wanted, NOW)) for seed in range(30)]
    by_device = {one.devices: one for one in found}
    assert set(by_device) == {(0,), (1,)}
    assert by_device[0,].stops == ("i1",)
    assert by_device[0,].drops == ("w-resting",)
    assert by_device[1,].drops == ("w-idle",)
    assert not any(one.preempts for one in found)


def test_random_is_refused_for_now_when_all_is_busy() -> None:
    made, _ = crowd(nodes=1, devices=1)
    made.model("busy", 15)
    made.runs("i1", "busy", "n0", tokens=(5,))
    refused = planner(made, "random").plan(made.model("new", 10), NOW)
    assert isinstance(refused, Refusal)
    assert not refused.hopeless


def test_random_draws_sets_of_devices_on_one_node() -> None:
    made, _ = crowd(nodes=2, devices=3)
    wanted = made.model("wide", 30, devices=2)
    drawn = planner(made, "random")
    places = Counter((found.node, found.devices) for found in (best(drawn.plan(wanted, NOW)) for _ in range(600)))
    assert len(places) == 6
    assert all(60 < count < 140 for count in places.values())


@pytest.mark.parametrize("name", ["random", "shepherd", "paper"])
def test_exclusive_policies_never_share_a_device(name: str) -> None:
    made, _ = crowd(nodes=1, devices=2, size=100)
    made.model("busy", 15)
    made.runs("i1", "busy", "n0", (0,), tokens=(5,), ready_s=0.0)
    wanted = made.model("new", 10)
    made.lies("new", "n0", Tier.DISK)
    for seed in range(10):
        assert best(planner(made, name, seed).plan(wanted, NOW)).devices == (1,)


def test_batched_policies_share_devices() -> None:
    made, _ = crowd(nodes=1, devices=1, size=100)
    made.model("busy", 15)
    made.runs("i1", "busy", "n0", (0,), tokens=(5,))
    wanted = made.model("new", 10)
    for name in ("random-batched", "shepherd-batched", "sllmctl"):
        found = best(planner(made, name).plan(wanted, NOW))
        assert found.devices == (0,)
        assert not found.preempts
        assert not found.stops


def contested() -> tuple[Crowd, Histories]:
    """The new model's weights lie in the DRAM of n0, whose device is busy; n1's is free, with a slow disk."""
    made, histories = crowd(nodes=2, devices=1)
    made.model("busy", 15)
    made.model("new", 10)
    made.runs("i1", "busy", "n0", tokens=(5,))
    made.lies("new", "n0", Tier.DRAM)
    made.lies("new", "n1", Tier.DISK)
    return made, histories


def test_shepherd_preempts_where_the_start_is_soonest() -> None:
    made, _ = contested()
    found = best(planner(made, "shepherd").plan(made.view.models["new"], NOW))
    assert (found.node, found.preempts, found.drops) == ("n0", ("i1",), ("w-busy",))


def test_shepherd_preempts_a_request_once() -> None:
    made, histories = contested()
    histories.before["i1"] = 1
    found = best(planner(made, "shepherd").plan(made.view.models["new"], NOW))
    assert (found.node, found.preempts) == ("n1", ())


def test_shepherd_does_not_preempt_who_has_not_served() -> None:
    made, _ = contested()
    made.view.instances["i1"].served = False
    assert best(planner(made, "shepherd").plan(made.view.models["new"], NOW)).node == "n1"


def test_shepherd_takes_a_free_place_of_equal_estimate() -> None:
    made, _ = contested()
    made.lies("new", "n1", Tier.DRAM)
    found = best(planner(made, "shepherd").plan(made.view.models["new"], NOW))
    assert (found.node, found.preempts) == ("n1", ())


def test_shepherd_passes_over_who_is_leaving() -> None:
    made, _ = contested()
    made.view.set_state(made.view.instances["i1"], InstanceState.DRAINING)
    assert best(planner(made, "shepherd").plan(made.view.models["new"], NOW)).node == "n1"


def test_shepherd_needs_histories() -> None:
    policy = POLICIES["shepherd"]
    made, _ = crowd()
    with pytest.raises(TypeError, match="who ran before"):
        policy.make(made.view, Estimates(RULES), NoJournals(), RULES, policy.abilities, Random(1))


def test_the_papers_policy_never_waits() -> None:
    made, _ = contested()
    assert isinstance(planner(made, "paper").plan(made.view.models["new"], NOW, wait_s=0.0), Plan)


def test_unknown_policies_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="'nonsense'; those there are: random, shepherd, paper"):
        policy_named("nonsense")

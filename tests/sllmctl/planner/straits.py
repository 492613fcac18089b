"""The rules of migration worked out by brute force, and small clusters in which the busy have to move for a newcomer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import exp

import msgspec
from hypothesis import strategies as st

from schema.states import InstanceState, Tier
from sllmctl.cluster.plans import Candidate
from sllmctl.cluster.records import Instance
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.rounds import rounds_s
from tests.sllmctl.planner.crowds import RULES, Crowd

WIDE = msgspec.structs.replace(
    RULES, kv_least_tokens=10, kv_sequence_tokens=20, disk_read_bps=20.0, device_copy_bps=100.0, prefill_token_s=0.01,
    prefill_base_s=0.05,
)  # fmt: skip
CONCURRENCY = 4
NAMES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Goal:
    """Where a victim goes: a ready instance, or a new one on these devices."""

    victim: str
    node: str
    devices: tuple[int, ...]
    ready: str = ""


class Twin:
    """The rules of migration, worked out one by one from the records of a cluster."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.view = crowd.view

    def image(self, model: str) -> int:
        return self.view.checkpoints[f"w-{model}"].image_bytes

    def share(self, node: str, model: str) -> int:
        return 0 if self.is_cpu(node) else -(-self.image(model) // self.view.models[model].spec.devices)

    def is_cpu(self, node: str) -> bool:
        return self.devices(node)[0][1] == "cpu"

    def devices(self, node: str) -> list[tuple[int, str, int]]:
        inventory = self.view.nodes[node].inventory
        assert inventory is not None
        return [(one.index, one.kind, one.memory_bytes) for one in inventory.devices]

    def at(self, node: str) -> list[Instance]:
        return [one for one in self.view.instances.values() if one.node == node]

    def lies(self, model: str, node: str, tier: Tier) -> bool:
        return any(
            one.digest == f"w-{model}" and one.node == node and one.tier is tier for one in self.view.placements.values()
        )

    def idle(self, node: str) -> dict[str, dict[int, int]]:
        """Models whose weights lie on devices of a node on which no instance has them."""
        used = {one.model for one in self.at(node)}
        found: dict[str, dict[int, int]] = {}
        for record in self.view.placements.values():
            model = record.digest.removeprefix("w-")
            if record.node == node and record.tier is Tier.DEVICE and model not in used:
                found.setdefault(model, {})[record.device] = record.size_bytes
        return found

    def drop_s(self, node: str, model: str) -> float:
        part = max(self.idle(node)[model].values())
        load_s = part / WIDE.device_copy_bps
        if not self.lies(model, node, Tier.DRAM):
            load_s = max(load_s, self.image(model) / WIDE.disk_read_bps)
        copies = {one.node for one in self.view.placements.values() if one.digest == f"w-{model}" and one.tier is Tier.DEVICE}
        return (1 - exp(-self.view.models[model].heat)) * load_s / len(copies)

    def load_s(self, node: str, model: str) -> float:
        """From DRAM or disk; infinite if it lies on neither."""
        seconds = 0.0 if self.is_cpu(node) else self.image(model) / self.view.models[model].spec.devices / WIDE.device_copy_bps
        if not self.lies(model, node, Tier.DRAM):
            if not self.lies(model, node, Tier.DISK):
                return float("inf")
            seconds = max(seconds, self.image(model) / WIDE.disk_read_bps)
        return max(seconds, WIDE.start_base_s)

    def sequences(self, name: str) -> Sequence[int]:
        return self.crowd.journals.tokens(name)

    def least(self, name: str) -> int:
        model = self.view.models[self.view.instances[name].model]
        token_bytes = -(-1 // model.spec.devices)
        return max(10, sum(self.sequences(name))) * token_bytes

    def free(self, node: str) -> dict[int, int]:
        """Bytes that no instance has been promised."""
        found = {index: size for index, _, size in self.devices(node)}
        for one in self.at(node):
            for index in one.devices:
                found[index] -= one.working_bytes + self.share(node, one.model)
        return found

    def victims(self, node: str, newcomer: str) -> list[str]:
        return [
            one.id for one in self.at(node)
            if one.state is InstanceState.READY and one.served and not one.moving and self.sequences(one.id)
            and one.model != newcomer
        ]  # fmt: skip

    def goals(self, name: str, node: str, devices: tuple[int, ...]) -> Iterator[Goal]:
        """All places for a victim beside a newcomer on these devices of a node."""
        one = self.view.instances[name]
        for other in self.view.instances.values():
            ready = other.state is InstanceState.READY and not other.moving
            apart = other.node != node or not set(other.devices) & set(devices)
            if other.model == one.model and other.id != name and ready and apart:
                yield Goal(name, other.node, other.devices, other.id)
        for there in self.view.nodes:
            allowed = [index for index, _, _ in self.devices(there) if there != node or index not in devices]
            for places in combinations(allowed, self.view.models[one.model].spec.devices):
                yield Goal(name, there, places)

    def starts_from_device(self, goal: Goal, node: str) -> bool:
        model = self.view.instances[goal.victim].model
        held = {
            one.device for one in self.view.placements.values()
            if (one.digest, one.node, one.tier) == (f"w-{model}", goal.node, Tier.DEVICE)
        }  # fmt: skip
        return goal.node != node and not self.is_cpu(goal.node) and set(goal.devices) <= held

    def hosts_hold(self, goals: Sequence[Goal]) -> bool:
        """The ready instances have room for all who go to them."""
        for name in {goal.ready for goal in goals if goal.ready}:
            sequences = [*self.sequences(name)]
            for other in self.view.instances.values():
                comes = other.moving or other.state is InstanceState.DRAINING
                if comes and other.model == self.view.instances[name].model:
                    sequences += self.sequences(other.id)
            for goal in goals:
                if goal.ready == name:
                    sequences += self.sequences(goal.victim)
            if len(sequences) > CONCURRENCY or sum(sequences) > self.view.instances[name].kv_capacity_tokens:
                return False
        return True

    def arena_holds(self, there: str, starts: Sequence[Goal], node: str) -> bool:
        inventory = self.view.nodes[there].inventory
        assert inventory is not None
        models = {one.model for one in self.at(there)}
        loads = {self.view.instances[goal.victim].model for goal in starts if not self.starts_from_device(goal, node)}
        if there == node:
            loads.add("m")
        return loads <= models or sum(self.image(model) for model in models | loads) <= inventory.arena.budget_bytes

    def droppable(self, there: str, starts: Sequence[Goal], node: str, devices: tuple[int, ...]) -> list[str]:
        own = {self.view.instances[goal.victim].model for goal in starts}
        return [
            model for model, lying in self.idle(there).items()
            if model not in own and (there != node or (model != "m" and not set(lying) & set(devices)))
        ]  # fmt: skip

    def fits(self, there: str, starts: Sequence[Goal], drops: Sequence[str], kv: dict[str, int]) -> bool:
        """Their devices hold the starts with so much KV, all who are there, and the idle weights that are not dropped."""
        for index, free in self.free(there).items():
            here = [goal for goal in starts if index in goal.devices]
            own = {self.view.instances[goal.victim].model for goal in here}
            lying = sum(
                on.get(index, 0) for model, on in self.idle(there).items() if model not in drops and model not in own
            )  # fmt: skip
            need = sum(kv[goal.victim] + self.share(there, self.view.instances[goal.victim].model) for goal in here)
            if here and need + lying > free:
                return False
        return True

    def settle(self, goals: Sequence[Goal], node: str, devices: tuple[int, ...]) -> tuple[float, float] | None:
        """(when the last has moved, what others pay) at the least; None if they cannot all go there."""
        if not self.hosts_hold(goals):
            return None
        room_s = delay_s = 0.0
        for there in {goal.node for goal in goals}:
            starts = [goal for goal in goals if goal.node == there and not goal.ready]
            ready_s = {goal.victim: 0.0 for goal in goals if goal.ready}
            if starts:
                kv = {goal.victim: self.least(goal.victim) for goal in starts}
                if not self.arena_holds(there, starts, node):
                    return None
                droppable = self.droppable(there, starts, node, devices)
                subsets = [drops for size in range(len(droppable) + 1) for drops in combinations(droppable, size)]
                prices = [
                    sum(self.drop_s(there, one) for one in drops) for drops in subsets if self.fits(there, starts, drops, kv)
                ]
                if not prices:
                    return None
                delay_s += min(prices)
                ready_s |= self.ready_s(there, starts, node)
            for goal in goals:
                if goal.node == there:
                    migrate_s, pause_s = self.rounds(goal)
                    room_s = max(room_s, ready_s[goal.victim] + migrate_s)
                    delay_s += len(self.sequences(goal.victim)) * pause_s
        return room_s, delay_s

    def ready_s(self, there: str, starts: Sequence[Goal], node: str) -> dict[str, float]:
        loads = {
            goal.victim: self.load_s(there, self.view.instances[goal.victim].model)
            for goal in starts if not self.starts_from_device(goal, node)
        }  # fmt: skip
        return {goal.victim: sum(loads.values()) if goal.victim in loads else WIDE.start_base_s for goal in starts}

    def rounds(self, goal: Goal) -> tuple[float, float]:
        digest = self.view.instances[goal.victim].digest
        return rounds_s(Estimates(WIDE), digest, self.devices(goal.node)[0][1], self.sequences(goal.victim))

    def costs(self) -> Iterator[tuple[float, float]]:
        """(the newcomer's start, what its room costs) for every place, everyone who may leave, and every target."""
        count = self.view.models["m"].spec.devices
        for node in self.view.nodes:
            start_s = self.load_s(node, "m")
            if start_s == float("inf") or not self.arena_holds(node, [], node):
                continue
            for devices in combinations([index for index, _, _ in self.devices(node)], count):
                for cost_s in self.rooms(node, devices):
                    yield start_s, cost_s

    def rooms(self, node: str, devices: tuple[int, ...]) -> Iterator[float]:
        free, idle = self.free(node), self.idle(node)
        need = 10 + self.share(node, "m")
        resting = [one for one in self.at(node) if not one.running and one.idle_since is not None]
        victims = self.victims(node, "m")
        gone_lists = [gone for size in range(len(idle) + 1) for gone in combinations(idle, size)]
        stop_lists = [stops for size in range(len(resting) + 1) for stops in combinations(resting, size)]
        for movers in (those for size in range(len(victims) + 1) for those in combinations(victims, size)):
            least_s: float | None = None
            for gone, stops in product(gone_lists, stop_lists):
                leaving = [*stops, *(self.view.instances[name] for name in movers)]
                room = {
                    index: free[index]
                    + sum(one.working_bytes + self.share(node, one.model) for one in leaving if index in one.devices)
                    - sum(on.get(index, 0) for model, on in idle.items() if model not in gone and model != "m")
                    for index in devices
                }
                if min(room.values()) >= need:
                    price_s = sum(self.drop_s(node, model) for model in gone) + sum(self.stop_s(one) for one in stops)
                    least_s = price_s if least_s is None else min(least_s, price_s)
            if least_s is None:
                continue
            for goals in product(*(list(self.goals(name, node, devices)) for name in movers)):
                if all(goal.ready or self.possible(goal, node) for goal in goals):
                    found = self.settle(goals, node, devices)
                    if found is not None:
                        yield least_s + sum(found)

    def possible(self, goal: Goal, node: str) -> bool:
        model = self.view.instances[goal.victim].model
        return self.starts_from_device(goal, node) or self.load_s(goal.node, model) < float("inf")

    def stop_s(self, one: Instance) -> float:
        """Ending a resting instance, its weights going with it."""
        called = 1 - exp(-self.view.models[one.model].heat)
        load_s = 0.0
        if not self.is_cpu(one.node):
            load_s = self.share(one.node, one.model) / WIDE.device_copy_bps
            if not self.lies(one.model, one.node, Tier.DRAM):
                load_s = max(load_s, self.image(one.model) / WIDE.disk_read_bps)
        copies = {
            other.node for other in self.view.placements.values() if other.digest == one.digest and other.tier is Tier.DEVICE
        }
        there = [other for other in self.view.instances.values() if other.model == one.model]
        return called * (WIDE.start_base_s / len(there) + load_s / max(1, len(copies)))

    # --- what a plan says ---

    def check(self, best: Candidate) -> None:
        """Every move is of one who may go, to where it may go, and all of them fit together."""
        goals = [Goal(move.instance, move.node, move.devices, move.target) for move in best.moves]
        assert len({goal.victim for goal in goals}) == len(goals)
        victims = self.victims(best.node, "m")
        for goal in goals:
            assert goal.victim in victims
            assert goal in list(self.goals(goal.victim, best.node, best.devices))
        assert self.hosts_hold(goals)
        for there in {goal.node for goal in goals}:
            moves = [move for move in best.moves if move.node == there and not move.target]
            starts = [Goal(move.instance, move.node, move.devices) for move in moves]
            drops = [digest.removeprefix("w-") for move in moves for digest in move.drops]
            assert len(set(drops)) == len(drops)
            assert set(drops) <= set(self.droppable(there, starts, best.node, best.devices))
            assert self.fits(there, starts, drops, {move.instance: move.working_bytes for move in moves})
            assert not starts or self.arena_holds(there, [goal for goal in starts if goal], best.node)
            ready_s = self.ready_s(there, starts, best.node)
            for move in moves:
                assert move.working_bytes >= self.least(move.instance)
                assert move.ready_s <= ready_s[move.instance] + 1e-9 or move.source is not Tier.DEVICE
        for move in best.moves:
            assert best.room_s >= move.ready_s + move.migrate_s - 1e-9
        paid_s = sum(self.drop_s(move.node, one.removeprefix("w-")) for move in best.moves for one in move.drops)
        paid_s += sum(len(self.sequences(move.instance)) * move.pause_s for move in best.moves)
        assert best.delay_s >= paid_s - 1e-9


@st.composite
def straits(draw: st.DrawFn) -> Crowd:
    """A few nodes of one kind: the first is full of the busy, most others have room or ready instances, and the newcomer is
    large."""
    crowd = Crowd()
    for name in NAMES:
        heat = draw(st.sampled_from([0.0, 0.3, 2.0]))
        crowd.model(name, draw(st.integers(30, 70)), devices=draw(st.sampled_from([1, 1, 1, 2])), heat=heat)
    crowd.model("m", draw(st.integers(60, 200)), devices=draw(st.sampled_from([1, 1, 2])))
    kind = draw(st.sampled_from(["cuda", "cuda", "cuda", "cpu"]))
    for number in range(draw(st.integers(2, 4))):
        node = f"n{number}"
        few = draw(st.sampled_from([1, 2, 2, 3])) if number < 2 else draw(st.sampled_from([1, 1, 2]))
        sizes = [draw(st.integers(100, 230)) for _ in range(few)]
        crowd.node(node, sizes, kind=kind, arena=draw(st.sampled_from([10_000, 10_000, 400 if number == 0 else 150])))
        for name in (*NAMES, "m"):
            if name != "m" or draw(st.integers(0, 5)) == 0 or number == 0:
                where = draw(st.sampled_from([None, Tier.DISK, Tier.DRAM, Tier.DRAM]))
                if where is not None:
                    crowd.lies(name, node, where)
        for name in draw(st.permutations((*NAMES, "m"))):
            often = ["busy"] * 6 + ["idle", "odd"] if number == 0 else ["none", "none", "busy", "idle", "idle", "rests", "odd"]
            _inhabit(draw, crowd, node, name, "idle" if name == "m" else draw(st.sampled_from(often)))
    return crowd


def _inhabit(draw: st.DrawFn, crowd: Crowd, node: str, name: str, state: str) -> None:
    view, inventory = crowd.view, crowd.view.nodes[node].inventory
    assert inventory is not None
    cpu = inventory.devices[0].kind == "cpu"
    count, image = view.models[name].spec.devices, view.checkpoints[f"w-{name}"].image_bytes
    share = 0 if cpu else -(-image // count)
    kv = draw(st.integers(10, 60)) if state != "idle" else 0
    devices = tuple(sorted(draw(st.permutations(range(len(inventory.devices))))[:count]))
    busy = sum(one.running > 0 for one in view.instances.values())
    room = [view.memory.free_bytes(node, inventory.devices[at]) for at in devices]
    held = view.memory.arena_held_bytes.get(node, 0) + image
    if state == "none" or len(devices) < count or min(room) < share + kv:
        return
    if state == "idle":
        if not cpu and (name != "m" or (node != "n0" and draw(st.integers(0, 3)) == 0)):
            # What the newcomer's weights lie on elsewhere is too small for it.
            for device in devices:
                crowd.lies(name, node, Tier.DEVICE, device, size=share - (name == "m"))
    elif held <= inventory.arena.budget_bytes and (state == "rests" or busy < 5):
        _settle(draw, crowd, node, name, devices, kv, state)


def _settle(draw: st.DrawFn, crowd: Crowd, node: str, name: str, devices: tuple[int, ...], kv: int, state: str) -> None:
    tokens = tuple(draw(st.lists(st.integers(1, kv), min_size=1, max_size=2))) if state != "rests" else ()
    while sum(tokens) > kv * len(devices):
        tokens = tokens[:-1]
    odd = draw(st.sampled_from(["unserved", "moving", "draining"])) if state == "odd" else ""
    one = crowd.runs(
        f"{node}-{name}", name, node, devices, kv=kv, tokens=tokens, idle_s=None if tokens else 5.0, served=odd != "unserved",
        state=InstanceState.DRAINING if odd == "draining" else InstanceState.READY, ready_s=2.0, remaining=1000.0,
    )  # fmt: skip
    one.kv_capacity_tokens = kv * len(devices)
    one.moving = odd == "moving"

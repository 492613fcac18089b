"""Placement against a brute-force twin that knows no index, and the reasons in words."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from schema.ids import Epoch
from schema.link import ArenaInfo, DeviceInfo, Inventory
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import HOLDING, Checkpoint, ClusterView, Instance, Model, Node, PlacementRecord
from sllmctl.planner import Plan, Refusal, Rejection, place
from sllmctl.planner.memory import kv_given_bytes, kv_need

RULES = ControlSettings(kv_least_tokens=2, kv_sequence_tokens=4, kv_sequences=2)
DIGESTS = ("d0", "d1", "d2")


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ClusterView, Model]:
    """A few nodes, devices and instances, in units so small that everything collides."""
    view = ClusterView()
    for digest in DIGESTS:
        view.add_checkpoint(Checkpoint(digest, "Tiny", draw(st.integers(1, 12)), draw(st.integers(1, 2)), 16, 0.0))
    for number in range(draw(st.integers(0, 4))):
        _draw_node(draw, view, f"n{number}")
    for number in range(draw(st.integers(0, 6)) if view.nodes else 0):
        _draw_instance(draw, view, f"i{number}")
    spec = ModelSpec(
        name="m",
        source=PathSource("/m"),
        devices=draw(st.integers(1, 2)),
        scale=ScaleSpec(max_concurrency=draw(st.integers(1, 3))),
        engine=EngineSpec(kv_bytes=draw(st.sampled_from([None, 3, 9]))),
    )
    model = Model(spec, ModelState.DEPLOYED, "d0", None, None, None, 0.0, 0.0)
    view.add_model(model)
    return view, model


def _draw_node(draw: st.DrawFn, view: ClusterView, name: str) -> None:
    state = draw(st.sampled_from([NodeState.READY, NodeState.READY, NodeState.READY, NodeState.UNREACHABLE, NodeState.JOINING]))
    view.add_node(Node(name, name, "unix:/x", state, draw(st.integers(0, 4)) == 0, 0.0, 0.0))
    if state is not NodeState.JOINING:
        kind = draw(st.sampled_from(["cpu", "cuda"]))
        sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        arena = ArenaInfo(id="a", budget_bytes=draw(st.integers(4, 40)), chunk_bytes=draw(st.sampled_from([1, 4])))
        devices = tuple(DeviceInfo(index=i, kind=kind, name=kind, memory_bytes=size) for i, size in enumerate(sizes))
        inventory = Inventory(
            hostname=name,
            cpus=1,
            memory_bytes=1,
            devices=devices,
            arena=arena,
            disk_read_bps=draw(st.sampled_from([0.0, 2.0, 5.0])),
            device_copy_bps=draw(st.sampled_from([0.0, 3.0])),
        )
        view.set_inventory(name, inventory)
    for digest in DIGESTS:
        tiers = [Tier.DISK] * draw(st.integers(0, 1)) + [Tier.DRAM] * draw(st.integers(0, 1))
        for tier in tiers:
            placed = draw(st.sampled_from([TierState.RESIDENT, TierState.RESIDENT, TierState.FILLING]))
            view.put_placement(PlacementRecord(digest, name, tier, 0, placed, 1, draw(st.integers(0, 1))))


def _draw_instance(draw: st.DrawFn, view: ClusterView, name: str) -> None:
    node = view.nodes[draw(st.sampled_from(sorted(view.nodes)))]
    count = len(node.inventory.devices) if node.inventory is not None else 1
    devices = tuple(range(draw(st.integers(1, count))))
    instance = Instance(
        id=name, model="other", node=node.id, digest=draw(st.sampled_from(DIGESTS)), epoch=Epoch(1),
        state=InstanceState.STARTING, devices=devices, kv_bytes=draw(st.integers(1, 8)), restarts=0, retry_at=None,
        fault=None, phases=None, reason="", created_at=0.0, changed_at=0.0,
    )  # fmt: skip
    view.add_instance(instance)
    view.set_state(instance, draw(st.sampled_from([InstanceState.READY, InstanceState.BACKOFF, InstanceState.FAILED])))


def _share(view: ClusterView, node: Node, instance_digest: str, count: int, device: DeviceInfo) -> int:
    return 0 if device.kind == "cpu" else -(-view.checkpoints[instance_digest].image_bytes // count)


def _brute(view: ClusterView, node: Node, model: Model) -> tuple[float, int, tuple[int, ...]] | None:
    """(seconds, free bytes, devices) on this node from first principles, or None."""
    lies = {
        one.tier for one in view.placements.values()
        if one.node == node.id and one.digest == "d0" and one.state is TierState.RESIDENT
    }  # fmt: skip
    if node.cordoned or node.state is not NodeState.READY or node.inventory is None or not lies & {Tier.DISK, Tier.DRAM}:
        return None
    holding = [one for one in view.instances.values() if one.node == node.id and one.state in HOLDING]
    rooms = []
    for device in node.inventory.devices:
        taken = sum(
            one.kv_bytes + _share(view, node, one.digest, len(one.devices), device)
            for one in holding
            if device.index in one.devices
        )
        rooms.append((device.memory_bytes - taken - _share(view, node, "d0", model.spec.devices, device), device.index))
    rooms.sort(key=lambda room: (-room[0], room[1]))
    if len(rooms) < model.spec.devices:
        return None
    free = rooms[model.spec.devices - 1][0]
    if free < kv_need(model.spec, view.checkpoints["d0"], RULES).least_bytes:
        return None
    used = {one.digest for one in holding} | {
        one.digest for one in view.placements.values() if one.node == node.id and one.tier is Tier.DRAM and one.users
    }
    chunk, budget = node.inventory.arena.chunk_bytes, node.inventory.arena.budget_bytes
    need = {digest: -(-view.checkpoints[digest].image_bytes // chunk) * chunk for digest in DIGESTS}
    if need["d0"] > budget or ("d0" not in used and sum(need[one] for one in used) + need["d0"] > budget):
        return None
    image = view.checkpoints["d0"].image_bytes
    seconds = [RULES.start_base_s]
    if Tier.DRAM not in lies:
        seconds.append(image / (node.inventory.disk_read_bps or RULES.disk_read_bps))
    if node.inventory.devices[0].kind != "cpu":
        seconds.append(image / model.spec.devices / (node.inventory.device_copy_bps or RULES.device_copy_bps))
    return max(seconds), free, tuple(sorted(index for _, index in rooms[: model.spec.devices]))


@settings(max_examples=400, deadline=None)
@given(clusters())
def test_place_finds_what_brute_force_finds(case: tuple[ClusterView, Model]) -> None:
    view, model = case
    twin = {name: found for name, node in view.nodes.items() if (found := _brute(view, node, model)) is not None}
    found = place(view, model, RULES)
    if isinstance(found, Refusal):
        assert twin == {}
        assert sum(found.rejected.values()) == len(view.nodes)
        return
    assert twin
    assert found.best.node == min(twin, key=lambda name: (twin[name][0], -twin[name][1], name))
    seconds, free, devices = twin[found.best.node]
    assert (found.best.startup_s, found.best.free_bytes, found.best.devices) == (seconds, free, devices)
    need = kv_need(model.spec, view.checkpoints["d0"], RULES)
    assert need.least_bytes <= found.best.kv_bytes <= max(free, 0)
    assert found.best.kv_bytes <= need.wanted_bytes
    assert sum(found.rejected.values()) == len(view.nodes) - len(twin)
    assert [one.startup_s for one in found.others] == sorted(one.startup_s for one in found.others)
    assert len(found.others) == min(len(twin), RULES.plan_candidates) - 1


@settings(max_examples=100, deadline=None)
@given(clusters())
def test_a_hopeless_refusal_stays_one_when_everything_stops(case: tuple[ClusterView, Model]) -> None:
    view, model = case
    found = place(view, model, RULES)
    if not isinstance(found, Refusal):
        return
    for instance in list(view.instances.values()):
        view.drop_instance(instance)
    for record in list(view.placements.values()):
        view.put_placement(PlacementRecord(record.digest, record.node, record.tier, 0, record.state, 1, 0))
    again = place(view, model, RULES)
    if found.hopeless:
        assert isinstance(again, Refusal)
        assert again.hopeless
    elif set(found.rejected) <= {Rejection.BUSY_DEVICE, Rejection.BUSY_ARENA}:
        assert isinstance(again, Plan)


def test_the_kv_rule() -> None:
    rules = ControlSettings(kv_least_tokens=2048, kv_sequence_tokens=4096, kv_sequences=8)
    checkpoint = Checkpoint("d", "Tiny", 1, 10, 100_000, 0.0)
    spec = ModelSpec(name="m", source=PathSource("/m"))
    need = kv_need(spec, checkpoint, rules)
    assert (need.least_bytes, need.wanted_bytes) == (20480, 8 * 40960)
    assert kv_given_bytes(need, 10**9) == need.wanted_bytes
    assert kv_given_bytes(need, 100_000) == 50_000
    assert kv_given_bytes(need, 30_000) == need.least_bytes
    short = ModelSpec(
        name="m", source=PathSource("/m"), engine=EngineSpec(max_context_tokens=100), scale=ScaleSpec(max_concurrency=2)
    )
    assert (kv_need(short, checkpoint, rules).least_bytes, kv_need(short, checkpoint, rules).wanted_bytes) == (1000, 2000)
    fixed = ModelSpec(name="m", source=PathSource("/m"), engine=EngineSpec(kv_bytes=7))
    assert kv_need(fixed, checkpoint, rules) == type(need)(7, 7)


def test_no_node_at_all_is_said() -> None:
    model = Model(ModelSpec(name="m", source=PathSource("/m")), ModelState.DEPLOYED, "d0", None, None, None, 0.0, 0.0)
    view = ClusterView()
    view.add_checkpoint(Checkpoint("d0", "Tiny", 1, 1, 16, 0.0))
    found = place(view, model, RULES)
    assert isinstance(found, Refusal)
    assert found.hopeless
    assert found.reason == "no node can hold model 'm': there is no node"

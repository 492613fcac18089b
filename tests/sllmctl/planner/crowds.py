"""Small clusters in which everything collides: instances of every kind, idle weights, few bytes, and journals for the busy."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from schema.ids import Epoch
from schema.link import ArenaInfo, DeviceInfo, Inventory
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PlacementRecord
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner import LocalityPlanner, PlannerOptions
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities

NOW = 1000.0
RULES = ControlSettings(
    kv_least_tokens=2, kv_sequence_tokens=4, kv_sequences=2, disk_read_bps=2.0, device_copy_bps=10.0, network_bps=1.0,
    prefill_token_s=0.001, prefill_base_s=0.01, kv_short_s=0.0,
)  # fmt: skip
"""The twins know nothing of what a short KV cache costs; tests of that ask for it."""


class Told:
    """Journals of which a test says everything."""

    def __init__(self) -> None:
        self.sequences: dict[str, tuple[int, ...]] = {}
        self.remaining: dict[str, float] = {}

    def tokens(self, instance: str) -> Sequence[int]:
        return self.sequences.get(instance, ())

    def remaining_s(self, instance: str) -> float:
        return self.remaining.get(instance, 0.0)

    def wait_s(self, model: str) -> float | None:
        return None


class Crowd:
    """A cluster by hand: nodes of equal devices, models of so many bytes, instances in any state."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.journals = Told()

    def node(self, name: str, sizes: Sequence[int], *, kind: str = "cuda", arena: int = 1000) -> None:
        self.view.add_node(Node(name, name, "unix:/x", NodeState.READY, False, 0.0, 0.0))
        devices = tuple(DeviceInfo(index=at, kind=kind, name=kind, memory_bytes=size) for at, size in enumerate(sizes))
        arena_info = ArenaInfo(id="a", budget_bytes=arena, chunk_bytes=1)
        self.view.set_inventory(name, Inventory(hostname=name, cpus=1, memory_bytes=1, devices=devices, arena=arena_info))

    def model(self, name: str, size: int, *, devices: int = 1, least: int = 0, heat: float = 0.0) -> Model:
        self.view.add_checkpoint(Checkpoint(f"w-{name}", "Tiny", size, 1, 1000, 0.0))
        spec = ModelSpec(
            name=name, source=PathSource("/m"), devices=devices, scale=ScaleSpec(min=least, max=9, max_concurrency=4),
            engine=EngineSpec(kv_bytes=None),
        )  # fmt: skip
        model = Model(spec, ModelState.DEPLOYED, f"w-{name}", None, None, None, 0.0, 0.0, heat=heat, heat_at=NOW)
        self.view.add_model(model)
        return model

    def lies(self, model: str, node: str, tier: Tier, device: int = 0, *, size: int | None = None, users: int = 0) -> None:
        size = self.view.checkpoints[f"w-{model}"].image_bytes if size is None else size
        self.view.put_placement(PlacementRecord(f"w-{model}", node, tier, device, TierState.RESIDENT, size, users))

    def runs(
        self,
        name: str,
        model: str,
        node: str,
        devices: tuple[int, ...] = (0,),
        *,
        kv: int = 2,
        tokens: tuple[int, ...] = (),
        idle_s: float | None = None,
        served: bool = True,
        state: InstanceState = InstanceState.READY,
        remaining: float = 0.0,
        ready_s: float = 500.0,
    ) -> Instance:
        """Busy with ``tokens``, or resting for ``idle_s``; its weights lie on its devices."""
        instance = Instance(
            id=name, model=model, node=node, digest=f"w-{model}", epoch=Epoch(1), state=InstanceState.STARTING,
            devices=devices, working_bytes=kv, restarts=0, retry_at=None, fault=None, phases=None, reason="",
            created_at=0.0, changed_at=0.0, kv_capacity_tokens=kv * len(devices) * 1000, served=served,
            ready_at=NOW - ready_s, life_at=NOW,
        )  # fmt: skip
        self.view.add_instance(instance)
        self.view.set_state(instance, state)
        since = NOW - idle_s if idle_s is not None and state is InstanceState.READY else None
        self.view.set_activity(instance, len(tokens), since)
        self.journals.sequences[name], self.journals.remaining[name] = tokens, remaining
        inventory = self.view.nodes[node].inventory
        assert inventory is not None
        if inventory.devices[0].kind != "cpu":
            share = -(-self.view.checkpoints[f"w-{model}"].image_bytes // len(devices))
            for device in devices:
                self.lies(model, node, Tier.DEVICE, device, size=share, users=1)
        return instance

    def planner(
        self,
        abilities: Abilities | None = None,
        *,
        options: PlannerOptions | None = None,
        estimates: Estimates | None = None,
        settings: ControlSettings = RULES,
    ) -> LocalityPlanner:
        estimates = estimates or Estimates(settings)
        return LocalityPlanner(self.view, estimates, self.journals, settings, abilities or Abilities(), options)


@st.composite
def crowds(draw: st.DrawFn, *, roomy_arena: bool = False) -> tuple[Crowd, Model]:
    """A few nodes with instances and weights wherever they fit, and a model that wants to start."""
    crowd = Crowd()
    names = ("a", "b", "c", "m")
    for name in names:
        crowd.model(
            name, draw(st.integers(2, 12)), devices=draw(st.sampled_from([1, 1, 2])), least=draw(st.sampled_from([0, 0, 0, 1])),
            heat=draw(st.sampled_from([0.0, 0.3, 2.0])),
        )  # fmt: skip
    for number in range(draw(st.integers(1, 3))):
        node = f"n{number}"
        kind = draw(st.sampled_from(["cuda", "cuda", "cpu"]))
        arena = 1000 if roomy_arena else draw(st.integers(10, 40))
        crowd.node(node, draw(st.lists(st.integers(12, 32), min_size=1, max_size=3)), kind=kind, arena=arena)
        for name in names:
            if draw(st.booleans()):
                crowd.lies(name, node, Tier.DISK)
            if draw(st.integers(0, 3)) == 0:
                crowd.lies(name, node, Tier.DRAM)
        _inhabit(draw, crowd, node, names, kind)
    model = crowd.view.models["m"]
    model.waiting_since = draw(st.sampled_from([None, NOW - 1.0, NOW - 100.0]))
    return crowd, model


def _inhabit(draw: st.DrawFn, crowd: Crowd, node: str, names: Sequence[str], kind: str) -> None:
    view = crowd.view
    inventory = view.nodes[node].inventory
    assert inventory is not None
    for number in range(draw(st.integers(0, 6))):
        name = draw(st.sampled_from(names))
        count = view.models[name].spec.devices
        image = view.checkpoints[f"w-{name}"].image_bytes
        share = 0 if kind == "cpu" else -(-image // count)
        devices = tuple(sorted(draw(st.permutations(range(len(inventory.devices))))[:count]))
        idle = kind != "cpu" and draw(st.integers(0, 2)) == 0
        kv = 0 if idle else draw(st.integers(1, 4))
        if len(devices) < count or any(view.memory.free_bytes(node, inventory.devices[at]) < share + kv for at in devices):
            continue
        held = view.memory.arena_held_bytes.get(node, 0) + (0 if view.memory.holds_arena(node, f"w-{name}") else image)
        if idle:
            for device in devices:
                if (f"w-{name}", node, Tier.DEVICE, device) not in view.placements:
                    crowd.lies(name, node, Tier.DEVICE, device, size=share)
        elif held <= inventory.arena.budget_bytes:
            _settle(draw, crowd, f"{node}-i{number}", name, node, devices, kv)


def _settle(draw: st.DrawFn, crowd: Crowd, name: str, model: str, node: str, devices: tuple[int, ...], kv: int) -> None:
    ready, drains, starts = InstanceState.READY, InstanceState.DRAINING, InstanceState.STARTING
    state = draw(st.sampled_from([ready, ready, ready, ready, drains, starts]))
    idle_s = draw(st.sampled_from([None, 0.5, 5.0, 50.0]))
    tokens = (40,) * draw(st.integers(1, 2)) if idle_s is None and state is not starts else ()
    crowd.runs(
        name, model, node, devices, kv=kv, tokens=tokens, idle_s=idle_s, served=draw(st.booleans()), state=state,
        remaining=draw(st.sampled_from([0.0, 3.0, 90.0])), ready_s=draw(st.sampled_from([2.0, 500.0])),
    )  # fmt: skip

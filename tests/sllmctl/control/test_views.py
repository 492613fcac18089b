"""What the admin API shows: the view's records with the router's numbers beside them."""

from __future__ import annotations

import msgspec

from schema.admin import FailingView, ProgressView
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import DiskCopy, InstanceLoad, InventoryUpdate, PlacementUpdate
from schema.states import InstanceState, NodeState, Tier, TierState
from sllmctl.cluster.changes import PutNode, PutPlacement
from sllmctl.control.events import AddModel, FromNode, Operate
from sllmctl.control.gauges import cluster_gauges
from sllmctl.control.views import checkpoint_views, instance_views, model_views, node_views
from tests.sllmctl.control.world import MIB, World, digest_of, spec


class Numbers:
    """A router that says the same of every model, and of one instance."""

    def __init__(self, load: InstanceLoad | None, moving: tuple[str | None, ...] = ("inst_1", "op_1")) -> None:
        self.load = load
        self.moving = moving

    def model_counts(self, model: str) -> tuple[int, int]:
        return (2, 3)

    def instance_load(self, instance: str) -> InstanceLoad | None:
        return self.load

    def progress(self, op_or_instance: str) -> ProgressView | None:
        return ProgressView(stage="read", done_bytes=1, total_bytes=2)

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        progress = ProgressView(stage="load", done_bytes=100, total_bytes=1000, source=Tier.DISK, now_bps=50.0)
        return [(str(id_), progress) for id_ in self.moving] if node == "local" else []


def test_every_noun_is_shown(world: World) -> None:
    world.serve(spec(least=1))
    instance = world.only()
    load = InstanceLoad(instance=instance.id, epoch=instance.epoch, running=4, waiting=0, kv_used_tokens=99)
    (node,) = node_views(world.view, Numbers(None))
    assert (node.name, node.state, node.instances) == ("local", NodeState.READY, 1)
    assert [load.id for load in node.loads] == ["inst_1", "op_1"]
    (model,) = model_views(world.view, Numbers(None))
    assert (model.name, model.instances, model.waiting, model.running, model.progress) == ("m", {"ready": 1}, 2, 3, None)
    (shown,) = instance_views(world.view, Numbers(load))
    assert (shown.id, shown.node, shown.state) == (instance.id, "local", InstanceState.READY)
    assert (shown.running, shown.kv_used_tokens, shown.kv_capacity_tokens) == (4, 99, 4096)
    (checkpoint,) = checkpoint_views(world.view)
    assert (checkpoint.digest, checkpoint.models, len(checkpoint.placements)) == (digest_of("m"), ("m",), 1)


def test_each_copy_on_a_disk_is_shown_with_how_it_came_there(world: World) -> None:
    agent, digest = world.agents["local"], digest_of("m")
    world.serve(spec(least=0))
    truth = agent.checkpoints[digest]

    def says(*copies: DiskCopy) -> None:
        disk = msgspec.structs.replace(truth.placements[0], copies=copies)
        world.tell("local", [PlacementUpdate(truth=msgspec.structs.replace(truth, placements=(disk,)))])

    says(
        DiskCopy(layout="exec1", state=TierState.RESIDENT, size_bytes=5),
        DiskCopy(layout="inplace1", state=TierState.QUARANTINED),
    )
    (checkpoint,) = checkpoint_views(world.view)
    assert [(copy.layout, copy.in_place, copy.state, copy.verified) for copy in checkpoint.placements[0].copies] == [
        ("exec1", False, TierState.RESIDENT, False), ("inplace1", True, TierState.QUARANTINED, False)
    ]  # fmt: skip
    says(DiskCopy(layout="exec1", state=TierState.RESIDENT, verified=True))
    _, _, step = world.history[-1]
    assert any(isinstance(change, PutPlacement) for change in step.changes), "who follows the stream is told"
    (checkpoint,) = checkpoint_views(world.view)
    assert [copy.verified for copy in checkpoint.placements[0].copies] == [True]


def test_a_node_that_knows_more_of_its_means_is_shown_with_them(world: World) -> None:
    stated = world.agents["local"].truth().inventory
    means = msgspec.structs.replace(stated, numerics="torch 1", memory_bytes=1 << 35)
    step = world.say(FromNode("local", InventoryUpdate(inventory=means)))
    (node,) = node_views(world.view, Numbers(None))
    assert node.inventory is not None
    assert (node.inventory.numerics, node.inventory.memory_bytes) == ("torch 1", 1 << 35)
    assert any(isinstance(change, PutNode) for change in step.changes), "who follows the stream is told"


def test_what_moves_on_a_node_is_named_by_what_it_is_of(world: World) -> None:
    world.serve(spec(least=1))
    world.agents["local"].automatic = False
    assert world.ask(lambda ticket: AddModel(ticket, spec("new"))) is None
    assert world.ask(lambda ticket: Operate(ticket, "verify", "m", None, None)) is None
    instance, (operation,) = world.only(), world.view.operations
    moving = [instance.id, operation, world.view.models["new"].op, "op_of_nobody"]
    numbers = Numbers(None, tuple(moving))
    (node,) = node_views(world.view, numbers)
    assert [load.of for load in node.loads] == ["model/m", f"checkpoint/{digest_of('m')[:12]}", "model/new", ""]


def test_a_model_without_a_place_is_shown_with_the_reason(world: World) -> None:
    world.serve(spec(kv_mib=1000))
    world.demand("m", 1)
    world.demand("m", 0)
    (model,) = model_views(world.view, Numbers(None))
    assert "too little device memory" in model.no_place
    world.view.set_refusal(world.view.models["m"], "there is no room now")
    (model,) = model_views(world.view, Numbers(None))
    assert model.no_place == "there is no room now"


def test_a_model_is_shown_with_what_is_wrong_with_its_instance_and_when_that_is_tried_again(world: World) -> None:
    world.serve(spec(least=1))
    world.agents["local"].automatic = False
    for state in [InstanceState.STARTING, *[InstanceState.BACKOFF] * 4, InstanceState.FAILED]:
        instance = world.only()
        world.pass_time(max(0.0, (instance.retry_at or 0.0) - world.now))
        world.crash(instance, Fault("out_of_space", "the device is full"))
        (model,) = model_views(world.view, Numbers(None))
        assert instance.state is state
        assert model.failing == (
            None
            if state is InstanceState.STARTING
            else FailingView(
                instance=instance.id, node="local", state=state, fault=Fault("out_of_space", "the device is full"),
                retry_at=instance.retry_at,
            )
        )  # fmt: skip
    assert instance.retry_at == world.now + world.settings.retry_first_s


def test_what_is_taken_of_a_node_is_what_lies_there_now(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("a", image_mib=3, dram=True)
    agent.hold("b", image_mib=5)
    world.connect("local")
    (node,) = node_views(world.view, Numbers(None))
    assert node.inventory is not None
    assert node.inventory.disk_used_bytes == 8 * MIB
    assert node.inventory.arena.used_bytes == 4 * MIB, "in whole chunks"


def test_loads_are_summed_by_where_their_bytes_come_from(world: World) -> None:
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in cluster_gauges(world.view, Numbers(None))
        for sample in family.samples
    }
    assert found["sllm_loads", "local", "load"] == 2
    assert found["sllm_load_bytes_per_second", "local", "disk"] == 100
    assert found["sllm_load_left_bytes", "local", "disk"] == 1800


def test_the_load_of_an_older_life_is_not_shown(world: World) -> None:
    world.serve(spec(least=1))
    stale = InstanceLoad(instance=world.only().id, epoch=Epoch(1), running=4, waiting=0, kv_used_tokens=99)
    (shown,) = instance_views(world.view, Numbers(stale))
    assert (shown.running, shown.kv_used_tokens) == (0, 0)

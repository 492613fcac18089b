"""What operators ask of checkpoints: which copies are meant, what is refused, and how an operation ends."""

from __future__ import annotations

import msgspec
import pytest

from schema.admin import OperationKind
from schema.errors import Fault
from schema.link import CheckpointTruth, DropCheckpoint, LoadCheckpoint, Placement, PlacementUpdate, VerifyCheckpoint
from schema.states import InstanceState, ModelState, Tier, TierState
from sllmctl.cluster.records import Operation
from sllmctl.control.events import AddModel, FromNode, Operate
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import MIB, Agent, World, digest_of, spec


def ask(world: World, kind: OperationKind, reference: str, node: str | None = None, tier: Tier | None = None) -> Fault | None:
    return world.ask(lambda ticket: Operate(ticket, kind, reference, node, tier))


def asked(world: World) -> list[Operation]:
    return [one for one in world.view.operations.values() if one.ticket == world.tickets]


def two(make_world: MakeWorld, **means: object) -> World:
    """Two nodes with the checkpoint of m on disk, the second with more memory."""
    agents = Agent("local"), Agent("far", arena_mib=2000)
    for agent in agents:
        agent.hold("m")
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    return world


def test_a_prefetch_goes_where_most_memory_is_free(make_world: MakeWorld) -> None:
    world = two(make_world)
    assert ask(world, "prefetch", digest_of("m")[:6]) is None
    (operation,) = asked(world)
    assert (operation.node, operation.tier, operation.ended_at, operation.fault) == ("far", Tier.DRAM, world.now, None)
    assert set(world.view.nodes_with(digest_of("m"), Tier.DRAM)) == {"far"}
    assert ask(world, "prefetch", digest_of("m"), "local") is None
    assert set(world.view.nodes_with(digest_of("m"), Tier.DRAM)) == {"far", "local"}
    assert world.reasons("checkpoint") == ["Prefetching", "Prefetched"] * 2
    world.check_rows()


def test_a_prefetch_to_a_device_takes_the_one_with_most_room(make_world: MakeWorld) -> None:
    agents = Agent("a", kind="cuda", device_mib=100), Agent("b", kind="cuda", device_mib=200, devices=2), Agent("c")
    for agent in agents:
        agent.hold("m")
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    digest = digest_of("m")
    assert ask(world, "prefetch", digest, None, Tier.DEVICE) is None
    (operation,) = asked(world)
    assert (operation.node, operation.tier, operation.device, operation.fault) == ("b", Tier.DEVICE, 1, None)
    assert list(agents[1].weights) == [(digest, 1)]
    assert ask(world, "prefetch", digest, "b", Tier.DEVICE) is None, "it lies there, so it stays there"
    assert list(agents[1].weights) == [(digest, 1)]
    assert ask(world, "prefetch", digest, "a", Tier.DEVICE) is None
    assert list(agents[0].weights) == [(digest, 0)]
    world.check_rows()
    fault = ask(world, "prefetch", digest, "c", Tier.DEVICE)
    assert fault is not None
    assert fault.message.startswith("node c has no device with memory of its own")


def test_a_prefetch_to_devices_that_are_full_is_refused(make_world: MakeWorld) -> None:
    agent = Agent("local", kind="cuda", device_mib=1)
    agent.hold("m")
    world = make_world(agent)
    world.connect("local")
    fault = ask(world, "prefetch", digest_of("m"), None, Tier.DEVICE)
    assert fault is not None
    assert "device 0 of node local has most free, 1048576" in fault.message


def test_a_model_is_a_name_of_its_checkpoint(world: World) -> None:
    world.serve(spec())
    assert ask(world, "verify", "m") is None
    (operation,) = asked(world)
    assert operation.digest == digest_of("m")
    assert isinstance(world.agents["local"].done, dict)
    assert any(isinstance(one, VerifyCheckpoint) for one in world.agents["local"].heard)


def test_the_checkpoint_of_a_model_that_could_not_be_ingested_is_not_to_be_waited_for(world: World) -> None:
    world.serve(spec())
    model = world.view.models["m"]
    world.view.set_digest(model, None)
    model.state, model.fault = ModelState.FAILED, Fault("not_found", "it is not on the hub")
    fault = ask(world, "verify", "m")
    assert fault is not None
    assert fault.message == "model 'm' could not be ingested: it is not on the hub; add it again"


def test_what_is_ambiguous_is_refused_by_name(make_world: MakeWorld) -> None:
    agent = Agent("local")
    agent.hold("m")
    first = digest_of("m")
    second = first[:5] + ("0" if first[5] != "0" else "1") + first[6:]
    agent.checkpoints[second] = msgspec.structs.replace(agent.checkpoints[first], digest=second)
    world = make_world(agent)
    world.connect("local")
    fault = ask(world, "verify", first[:5])
    assert fault is not None
    assert fault.code == "conflict"
    assert first[:16] in fault.message
    assert second[:16] in fault.message
    assert ask(world, "verify", first[:6]) is None


def test_a_model_named_like_another_checkpoint_is_ambiguous(make_world: MakeWorld) -> None:
    other = digest_of("m")[:5]
    agent = Agent("local")
    agent.hold("m")
    world = make_world(agent)
    world.connect("local")
    world.serve(spec(other))
    fault = ask(world, "verify", other)
    assert fault is not None
    assert fault.code == "conflict"
    assert f"(of {other})" in fault.message


@pytest.mark.parametrize(
    ("kind", "reference", "node", "code"),
    [
        ("verify", "ffff", None, "not_found"),
        ("verify", "ff", None, "invalid_input"),
        ("verify", "m", "nowhere", "not_found"),
        ("verify", "m", "far", "not_found"),
        ("prefetch", "m", "far", "conflict"),
        ("drop", "m", "far", "not_found"),
    ],
)
def test_what_is_not_there_is_said(make_world: MakeWorld, kind: OperationKind, reference: str, node: str, code: str) -> None:
    world = make_world(Agent("local"), Agent("far"))
    world.connect("local")
    world.connect("far")
    world.serve(spec())
    fault = ask(world, kind, reference, node)
    assert fault is not None
    assert fault.code == code
    assert not world.view.operations


def test_a_drop_takes_memory_and_disk_of_every_node_and_forgets_the_checkpoint(make_world: MakeWorld) -> None:
    world = two(make_world)
    ask(world, "prefetch", digest_of("m"), "far")
    assert ask(world, "drop", digest_of("m")) is None
    assert [(one.node, one.tier, one.fault) for one in asked(world)] == [
        ("far", Tier.DRAM, None),
        ("far", Tier.DISK, None),
        ("local", Tier.DISK, None),
    ]
    assert digest_of("m") not in world.view.checkpoints
    world.check_rows()


def test_a_drop_spares_what_is_in_use_and_the_last_sound_copy_that_a_model_needs(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("far"))
    world.agents["far"].hold("m")
    world.connect("local")
    world.connect("far")
    world.serve(spec(least=1))
    instance = world.only()
    fault = ask(world, "drop", "m", instance.node)
    assert fault is not None
    assert instance.id in fault.message
    other = "far" if instance.node == "local" else "local"
    assert ask(world, "drop", "m", other) is None
    world.demand("m", 0)
    for tier in (Tier.DISK, None):
        fault = ask(world, "drop", "m", None, tier)
        assert fault is not None
        assert fault.code == "conflict"


def test_the_last_copy_goes_only_with_its_model(world: World) -> None:
    world.serve(spec())
    fault = ask(world, "drop", "m")
    assert fault is not None
    assert "last sound copy" in fault.message
    assert not any(isinstance(one, DropCheckpoint) for one in world.agents["local"].heard)


def test_an_operation_outlasts_its_link_and_its_agent_under_one_name(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m")
    world.connect("local")
    agent.automatic = False
    assert ask(world, "prefetch", digest_of("m")) is None
    (operation,) = asked(world)
    world.lose("local")
    assert operation.ended_at is None
    world.connect("local")
    assert [type(one) for one in agent.heard].count(LoadCheckpoint) == 1
    world.lose("local")
    agent.forget()
    world.connect("local")
    assert [one.op for one in agent.heard if isinstance(one, LoadCheckpoint)] == [operation.id] * 2
    world.tell("local", agent.finish(operation.id))
    assert operation.ended_at == world.now
    assert not agent.done
    assert not world.loop._core.prefetches


def test_an_end_that_a_truth_tells_is_taken(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m")
    world.connect("local")
    agent.automatic = False
    ask(world, "verify", digest_of("m"))
    (operation,) = asked(world)
    world.lose("local")
    agent.finish(operation.id, Fault("invalid_checkpoint", "partition_0.bin is wrong"))
    world.connect("local")
    assert operation.fault == Fault("invalid_checkpoint", "partition_0.bin is wrong")
    assert world.reasons("checkpoint")[-1] == "VerifyFailed"


def test_a_restarted_manager_ends_what_it_does_not_know(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("m")
    world.connect("local")
    agent.automatic = False
    ask(world, "verify", digest_of("m"))
    world.start_manager()
    world.connect("local")
    assert agent.ops == {}


def test_an_ended_operation_is_remembered_among_a_thousand(world: World) -> None:
    world.agents["local"].hold("m")
    world.connect("local")
    for _ in range(1010):
        ask(world, "verify", digest_of("m"))
    assert len(world.view.operations) == 1000
    assert len(asked(world)) == 1


def quarantine(world: World, tier: Tier, state: TierState = TierState.QUARANTINED) -> None:
    truth = world.agents["local"].checkpoints[digest_of("m")]
    reason = "partition_0.bin: 9 bytes are wrong" if state is TierState.QUARANTINED else ""
    bad = Placement(tier=tier, state=state, size_bytes=truth.image_bytes, reason=reason)
    others = tuple(one for one in truth.placements if one.tier is not tier)
    truth = msgspec.structs.replace(truth, placements=(*others, bad))
    world.do(FromNode("local", PlacementUpdate(truth=truth)))


def test_a_damaged_copy_that_does_not_say_what_it_is_is_known_by_the_next_that_does(world: World) -> None:
    digest = digest_of("x")
    bad = Placement(tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=9000, reason="manifest.json: damaged")
    unknown = CheckpointTruth(
        digest=digest, architecture="", image_bytes=0, kv_token_bytes=0, max_context_tokens=0, placements=(bad,)
    )
    world.tell("local", [PlacementUpdate(truth=unknown)])
    (record,) = world.view.placements_of(digest).values()
    assert (record.state, record.size_bytes) == (TierState.QUARANTINED, 9000)
    sound = Placement(tier=Tier.DISK, state=TierState.RESIDENT, size_bytes=4096)
    known = CheckpointTruth(
        digest=digest, architecture="A", image_bytes=4096, kv_token_bytes=8, max_context_tokens=64, placements=(sound,)
    )
    for truth in (known, unknown):  # and what is known stays known
        world.tell("local", [PlacementUpdate(truth=truth)])
        checkpoint = world.view.checkpoints[digest]
        assert (checkpoint.architecture, checkpoint.image_bytes, checkpoint.kv_token_bytes) == ("A", 4096, 8)
    world.check_rows()


def test_of_layouts_of_one_checkpoint_the_largest_image_is_what_has_to_find_room(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("far"))
    for node, size in (("local", 8), ("far", 9)):
        world.agents[node].hold("m", image_mib=size)
        world.connect(node)
    for node in ("local", "far"):
        world.tell(node, [PlacementUpdate(truth=world.agents[node].checkpoints[digest_of("m")])])
        assert world.view.checkpoints[digest_of("m")].image_bytes == 9 * MIB
    damaged = msgspec.structs.replace(world.agents["far"].checkpoints[digest_of("m")], architecture="", image_bytes=99 * MIB)
    world.tell("far", [PlacementUpdate(truth=damaged)])
    assert world.view.checkpoints[digest_of("m")].image_bytes == 9 * MIB, "what a manifest on a disk says counts more"
    world.check_rows()


def test_a_quarantined_copy_is_no_source_says_why_and_comes_back(world: World) -> None:
    world.serve(spec())
    quarantine(world, Tier.DISK)
    record = world.view.placements[digest_of("m"), "local", Tier.DISK, 0]
    assert record.reason == "partition_0.bin: 9 bytes are wrong"
    assert any("fetch or ingest it again" in event.message for event in world.events), "what to do is said"
    assert not world.view.nodes_with(digest_of("m"), Tier.DISK)
    assert any("9 bytes are wrong" in one.message for one in world.events if one.reason == "Quarantined")
    refused = world.ask(lambda ticket: AddModel(ticket, spec()))
    assert refused is not None
    assert "no disk has a sound copy of it: remove it and add it again" in refused.message
    world.demand("m", 1)
    assert not world.view.instances_of("m")
    quarantine(world, Tier.DISK, TierState.RESIDENT)
    assert world.only().state is InstanceState.READY
    assert "Released" in world.reasons("checkpoint")
    world.check_rows()


def test_a_bad_copy_beside_a_sound_one_is_told_once_and_takes_nothing_away(world: World) -> None:
    world.serve(spec())
    truth = world.agents["local"].checkpoints[digest_of("m")]
    why = "copy inplace1 is in quarantine: model.safetensors was written to"
    disk = Placement(tier=Tier.DISK, state=TierState.RESIDENT, size_bytes=truth.image_bytes, reason=why)
    others = tuple(one for one in truth.placements if one.tier is not Tier.DISK)
    truth = msgspec.structs.replace(truth, placements=(*others, disk))
    for _ in range(2):
        world.do(FromNode("local", PlacementUpdate(truth=truth)))
    assert world.view.placements[digest_of("m"), "local", Tier.DISK, 0].reason == why
    (told,) = [event.message for event in world.events if event.reason == "Quarantined"]
    assert told == f"on disk of node local a sound copy is left: {why}"
    world.demand("m", 1)
    assert world.only().state is InstanceState.READY
    world.check_rows()


def test_wrong_weights_in_memory_end_their_instances_at_once(world: World) -> None:
    world.serve(spec(least=1))
    first = world.only()
    quarantine(world, Tier.DRAM)
    assert first.id not in world.view.instances
    assert "Quarantined" in world.reasons("instance")
    (told,) = [event.message for event in world.events if (event.reason, event.kind) == ("Quarantined", "checkpoint")]
    assert "suspect that memory" in told
    assert "ingest it again" not in told
    assert world.only().state is InstanceState.READY


def test_every_state_outlasts_the_manager_and_yields_to_the_next_truth(world: World) -> None:
    agent = world.agents["local"]
    states = (TierState.FILLING, TierState.RESIDENT, TierState.QUARANTINED, TierState.EVICTING)
    for name, state in zip("abcd", states, strict=True):
        agent.hold(name)
        truth = agent.checkpoints[digest_of(name)]
        there = Placement(tier=Tier.DRAM, state=state, size_bytes=truth.image_bytes, users=2, reason="r" if name == "c" else "")
        agent.checkpoints[digest_of(name)] = msgspec.structs.replace(truth, placements=(*truth.placements, there))
    world.connect("local")
    before = {key: (one.state, one.size_bytes, one.used_at) for key, one in world.view.placements.items()}
    assert {state for (_, _, tier, _), (state, _, _) in before.items() if tier is Tier.DRAM} == set(states)
    world.start_manager()
    assert {key: (one.state, one.size_bytes, one.used_at) for key, one in world.view.placements.items()} == before
    world.connect("local")
    after = {key: (one.state, one.users, one.reason) for key, one in world.view.placements.items()}
    assert after[digest_of("c"), "local", Tier.DRAM, 0] == (TierState.QUARANTINED, 2, "r")
    assert {users for (_, _, tier, _), (_, users, _) in after.items() if tier is Tier.DRAM} == {2}
    world.check_rows()
    for name in "abcd":
        truth = agent.checkpoints[digest_of(name)]
        agent.checkpoints[digest_of(name)] = msgspec.structs.replace(truth, placements=truth.placements[:1])
    world.start_manager()
    world.connect("local")
    assert all(tier is Tier.DISK for _, _, tier, _ in world.view.placements)
    assert not any(world.view.memory.arena_held_bytes.values())
    world.check_rows()


def test_wrong_weights_in_memory_leave_the_devices_that_they_were_copied_to(make_world: MakeWorld) -> None:
    agent = Agent("local", kind="cuda", device_mib=100)
    world = make_world(agent)
    world.connect("local")
    world.serve(spec(least=1))
    first = world.only()
    assert agent.weights
    truth = agent._restate(digest_of("m")).truth
    bad = [
        msgspec.structs.replace(one, state=TierState.QUARANTINED, reason="wrong") if one.tier is Tier.DRAM else one
        for one in truth.placements
    ]
    world.do(FromNode("local", PlacementUpdate(truth=msgspec.structs.replace(truth, placements=tuple(bad)))))
    assert any(isinstance(one, DropCheckpoint) and one.tier is Tier.DEVICE for one in agent.heard)
    assert first.id not in world.view.instances
    world.check_rows()


def test_all_of_a_checkpoint_includes_what_lies_on_devices(make_world: MakeWorld) -> None:
    agent = Agent("local", kind="cuda", devices=2)
    agent.hold("m", dram=True)
    agent.weights = {(digest_of("m"), 0): 4, (digest_of("m"), 1): 4}
    agent._restate(digest_of("m"))
    world = make_world(agent)
    world.connect("local")
    assert ask(world, "drop", digest_of("m")) is None
    assert [one.tier for one in asked(world)] == [Tier.DEVICE, Tier.DRAM, Tier.DISK]
    assert digest_of("m") not in world.view.checkpoints
    assert not agent.weights
    world.check_rows()


@pytest.mark.parametrize("quarantine_first", [False, True])
def test_a_start_from_a_bad_copy_is_planned_anew_with_another(make_world: MakeWorld, quarantine_first: bool) -> None:
    world = two(make_world)
    world.serve(spec(least=1))
    world.demand("m", 1)
    first = world.only()
    other = "far" if first.node == "local" else "local"
    truth = world.agents[first.node].checkpoints[digest_of("m")]
    bad = Placement(
        tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=truth.image_bytes, reason="partition_0.bin is wrong"
    )
    update = FromNode(first.node, PlacementUpdate(truth=msgspec.structs.replace(truth, placements=(bad,))))
    steps = [
        lambda: world.crash(first, Fault("invalid_checkpoint", "partition_0.bin is wrong")),
        lambda: world.do(update),
    ]
    for step in reversed(steps) if quarantine_first else steps:
        step()
    world.pass_time(5)
    again = world.only()
    assert (again.node, again.state) == (other, InstanceState.READY)
    assert world.rejected == [], "who waits is served by the other"
    world.check_rows()


def test_a_checkpoint_that_no_copy_can_be_started_from_is_tried_once_more(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.serve(spec(least=1))
    world.demand("m", 1)
    fault = Fault("invalid_checkpoint", "the engine cannot run it")
    world.crash(world.only(), fault)
    assert (world.only().state, world.rejected) == (InstanceState.BACKOFF, []), "its copy may yet be found wrong"
    world.pass_time(5)
    world.crash(world.only(), fault)
    assert world.only().state is InstanceState.FAILED
    assert len(world.rejected) == 1


def test_a_start_from_the_only_copy_fails_with_what_is_wrong_with_it(world: World) -> None:
    world.serve(spec(least=1))
    world.crash(world.only(), Fault("invalid_checkpoint", "partition_0.bin is wrong"))
    quarantine(world, Tier.DISK)
    assert world.only().state is InstanceState.FAILED
    assert world.only().fault == Fault("invalid_checkpoint", "partition_0.bin is wrong")

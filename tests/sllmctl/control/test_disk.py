"""Room on disks: what goes for an ingest, against a brute-force twin, and what never does."""

from __future__ import annotations

import random

import msgspec
import pytest

from schema.errors import Fault
from schema.link import DropCheckpoint, Ingest, PlacementUpdate
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.records import Operation, PlacementRecord, Publication
from sllmctl.control.disk import victims
from sllmctl.control.events import AddModel, FromNode, Operate, Pin
from sllmctl.control.turn import Drop
from tests.examples import examples
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import MIB, Agent, World, digest_of, spec

NODES = ("local", "n1", "n2")
NAMES = ("a", "b", "c", "d", "e")


def short(world: World, mib: int) -> None:
    """The ingest under way says that so much of the disk is missing."""
    agent = world.agents["local"]
    (op,) = [op for op, asked in agent.ops.items() if isinstance(asked, Ingest)]
    world.tell("local", agent.finish(op, Fault("out_of_space", "the budget would be passed", mib * MIB)))


def two(make_world: MakeWorld) -> World:
    """a and b lie on both nodes, a was used first; c on the local one alone."""
    agents = Agent("local"), Agent("far")
    for agent in agents:
        agent.hold("a")
        agent.hold("b")
    agents[0].hold("c", image_mib=100)
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    for at, name in enumerate(("a", "b", "c")):
        world.view.placements[digest_of(name), "local", Tier.DISK, 0].used_at = float(at)
    agents[0].automatic = False
    assert world.ask(lambda ticket: AddModel(ticket, spec("new"))) is None
    return world


def test_an_ingest_that_lacks_room_gets_it_from_what_can_be_had_again(make_world: MakeWorld) -> None:
    world = two(make_world)
    agent = world.agents["local"]
    short(world, 5)
    ops = list(agent.ops.values())
    assert [type(one) for one in ops] == [DropCheckpoint, Ingest]
    assert isinstance(ops[0], DropCheckpoint)
    assert (ops[0].digest, ops[0].tier) == (digest_of("a"), Tier.DISK)
    for op in list(agent.ops):
        world.tell("local", agent.finish(op))
    assert world.view.models["new"].state is ModelState.STOPPED
    assert set(world.view.nodes_with(digest_of("a"), Tier.DISK)) == {"far"}
    assert "Evicted" in world.reasons("checkpoint")
    assert not agent.done
    world.check_rows()


def test_what_lies_in_the_users_own_files_makes_no_room(make_world: MakeWorld) -> None:
    world = two(make_world)
    agent = world.agents["local"]
    truth = agent.checkpoints[digest_of("a")]
    (disk,) = truth.placements
    in_place = msgspec.structs.replace(truth, placements=(msgspec.structs.replace(disk, size_bytes=0),))
    world.tell("local", [PlacementUpdate(truth=in_place)])
    short(world, 5)
    (drop,) = [one for one in agent.ops.values() if isinstance(one, DropCheckpoint)]
    assert drop.digest == digest_of("b")
    world.check_rows()


def test_what_is_missing_beyond_that_fails_the_ingest_and_drops_nothing(make_world: MakeWorld) -> None:
    world = two(make_world)
    short(world, 17)
    assert world.view.models["new"].state is ModelState.FAILED
    assert not any(isinstance(one, DropCheckpoint) for one in world.agents["local"].heard)
    world.check_rows()


def test_room_is_made_a_bounded_number_of_times(make_world: MakeWorld) -> None:
    world = two(make_world)
    for name in ("d", "e"):
        for agent in world.agents.values():
            agent.hold(name)
    world.connect("far")
    world.connect("local")
    for _ in range(3):
        short(world, 1)
        agent = world.agents["local"]
        (drop,) = [op for op, asked in agent.ops.items() if isinstance(asked, DropCheckpoint)]
        world.tell("local", agent.finish(drop))
    short(world, 1)
    assert world.view.models["new"].state is ModelState.FAILED


def test_what_is_pinned_stays(make_world: MakeWorld) -> None:
    world = two(make_world)
    assert world.ask(lambda ticket: Pin(ticket, digest_of("a"), "local", Tier.DISK, True)) is None
    short(world, 5)
    (drop,) = [one for one in world.agents["local"].ops.values() if isinstance(one, DropCheckpoint)]
    assert drop.digest == digest_of("b")


def test_a_fetch_that_lacks_room_gets_it_once(make_world: MakeWorld) -> None:
    world = two(make_world)
    agent = world.agents["local"]
    fetched = "ef" * 32
    assert world.ask(lambda ticket: Operate(ticket, "fetch", fetched, "local", None, "file:///remote")) is None
    (operation,) = [one for one in world.view.operations.values() if one.ticket == world.tickets]
    lacking = Fault("out_of_space", "the budget would be passed", 5 * MIB)
    world.tell("local", agent.finish(operation.id, lacking))
    (drop,) = [op for op, asked in agent.ops.items() if isinstance(asked, DropCheckpoint)]
    assert list(agent.ops) == [next(iter(agent.ops)), drop, operation.id], "the fetch is asked for again, after the drop"
    world.tell("local", agent.finish(drop))
    world.tell("local", agent.finish(operation.id, lacking))
    assert operation.fault == lacking
    assert not agent.done


def test_a_fetch_whose_room_was_asked_for_over_a_link_that_broke_gets_it(make_world: MakeWorld) -> None:
    world = two(make_world)
    agent = world.agents["local"]
    assert world.ask(lambda ticket: Operate(ticket, "fetch", "ef" * 32, "local", None, "file:///remote")) is None
    (operation,) = [one for one in world.view.operations.values() if one.ticket == world.tickets]
    lacking = Fault("out_of_space", "the budget would be passed", 5 * MIB)
    (end,) = agent.finish(operation.id, lacking)
    agent.connected = False
    world.do(FromNode("local", end))
    world.lose("local")
    world.connect("local")
    assert operation.ended_at is None
    world.tell("local", agent.finish(operation.id, lacking))
    (drop,) = [op for op, asked in agent.ops.items() if isinstance(asked, DropCheckpoint)]
    world.tell("local", agent.finish(drop))
    world.tell("local", agent.finish(operation.id, lacking))
    assert operation.fault == lacking
    assert not agent.done


def test_a_start_that_lacks_disk_has_it_when_it_is_tried_again(make_world: MakeWorld) -> None:
    agents = Agent("local"), Agent("far")
    for agent in agents:
        agent.hold("a")
    agents[0].hold("m")
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    world.serve(spec("m", least=1))
    instance = world.only("m")
    world.crash(instance, Fault("out_of_space", "the budget would be passed", 3 * MIB))
    assert set(world.view.nodes_with(digest_of("a"), Tier.DISK)) == {"far"}
    assert "Evicted" in world.reasons("checkpoint")
    world.pass_time(5)
    assert world.only("m").state is InstanceState.READY


def may_go(world: World, digest: str, node: str) -> bool:
    """Of the rule's words, one by one."""
    view, core = world.view, world.loop._core
    here = [one for one in view.placements.values() if (one.digest, one.node) == (digest, node)]
    if not any(one.size_bytes for one in here if one.tier is Tier.DISK):
        return False
    if (digest, node, Tier.DISK) in view.pins or any(one.users for one in here):
        return False
    if any((one.digest, one.node) == (digest, node) for one in view.instances.values()):
        return False
    if any((one.digest, one.node) == (digest, node) and one.ended_at is None for one in view.operations.values()):
        return False
    leaving = {(one.node, one.digest) for one in core.drops.values() if one.tier is Tier.DISK}
    leaving |= {(one.node, one.digest) for one in view.operations.values() if one.kind == "drop" and one.ended_at is None}
    if (node, digest) in leaving or (node, digest) in core.prefetches.values():
        return False
    for model in view.models.values():
        if model.digest == digest and model.state is ModelState.DEPLOYED and model.spec.scale.min > 0:
            return False
    if any(each.digest == digest for each in view.publications.values()):
        return True
    left = [
        one
        for one in view.placements.values()
        if (one.digest, one.tier, one.state) == (digest, Tier.DISK, TierState.RESIDENT)
        and one.node != node
        and view.nodes[one.node].state is NodeState.READY
        and (one.node, digest) not in leaving
    ]
    return bool(left)


def disturb(world: World, draw: random.Random) -> None:
    """Any state that the loop may be in: users, pins, instances, drops, loads, minima, quarantine, nodes that are away."""
    view, core = world.view, world.loop._core
    for key, record in list(view.placements.items()):
        state = TierState.QUARANTINED if draw.random() < 0.15 else record.state
        users = draw.choice((0, 0, 0, 1)) if record.tier is Tier.DRAM else 0
        size = draw.randrange(1, 9) * MIB
        changed = PlacementRecord(*key[:3], 0, state, size, users, "", float(draw.randrange(4)))
        view.put_placement(changed)
        digest, node = key[:2]
        chance = draw.random()
        if chance < 0.1:
            view.add_pin((digest, node, record.tier), 1.0)
        elif chance < 0.16:
            core.drops[f"drop{len(core.drops)}"] = Drop(node, digest, Tier.DISK, 1)
            core.dropping[node, digest, Tier.DISK] = f"drop{len(core.drops) - 1}"
        elif chance < 0.22:
            core.prefetches[f"load{len(core.prefetches)}"] = (node, digest)
        elif chance < 0.3:
            op = f"op{len(view.operations)}"
            kind = draw.choice(("verify", "drop", "prefetch"))
            ended = draw.choice((None, 2.0))
            view.operations[op] = Operation(op, 1, kind, digest, node, Tier.DISK, size, 1.0, ended)  # type: ignore[arg-type]
    for digest in view.checkpoints:
        if draw.random() < 0.2:
            view.put_publication(Publication(digest, "file:///r", "exec1", 1.0))
    if draw.random() < 0.3:
        world.lose(draw.choice(NODES))


@pytest.mark.parametrize("round_", range(examples(60)))
def test_the_choice_is_that_of_brute_force(make_world: MakeWorld, round_: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    agents = [Agent(node) for node in NODES]
    for agent in agents:
        for name in NAMES:
            if draw.random() < 0.7:
                agent.hold(name, dram=draw.random() < 0.3)
    world = make_world(*agents)
    for agent in agents:
        world.connect(agent.name)
    for name in NAMES:
        if draw.random() < 0.3 and digest_of(name) in world.view.checkpoints:
            world.serve(spec(name, least=draw.choice((0, 0, 1))))
    disturb(world, draw)
    for node in NODES:
        disks = [one for one in world.view.placements_on(node).values() if one.tier is Tier.DISK]
        able = [one for one in disks if may_go(world, one.digest, node)]
        total = sum(one.size_bytes for one in able)
        for short_bytes in {1, MIB, draw.randrange(1, 30 * MIB), total, total + 1} - {0}:
            chosen = victims(world.loop._core, node, short_bytes)
            if total < short_bytes:
                assert chosen == []
                continue
            assert {one.key for one in chosen} <= {one.key for one in able}
            freed = sum(one.size_bytes for one in chosen)
            assert freed >= short_bytes
            # Oldest first: nothing older that may go stays, and without the youngest it would not do.
            order = sorted(able, key=lambda one: (one.used_at, one.digest))
            assert [one.key for one in chosen] == [one.key for one in order[: len(chosen)]]
            assert freed - chosen[-1].size_bytes < short_bytes
            prefixes = [order[:count] for count in range(len(order) + 1)]
            enough = [one for one in prefixes if sum(record.size_bytes for record in one) >= short_bytes]
            assert len(chosen) == min(map(len, enough))
            for digest in {one.digest for one in chosen}:
                assert world.view.publications_of(digest) or any(
                    other != node and (other, digest) not in {(d.node, d.digest) for d in world.loop._core.drops.values()}
                    for other in world.view.nodes_with(digest, Tier.DISK)
                )

"""Publish, fetch and forget: who does it, from where, what is remembered, and what may then go from the disks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from schema.admin import OperationKind
from schema.errors import Fault
from schema.link import (
    CancelOperation,
    Fetch,
    OperationDone,
    Placement,
    PlacementUpdate,
    Publish,
    RemoteCopy,
    StartInstance,
)
from schema.states import InstanceState, Tier, TierState
from sllmctl.cluster.settings import ControlSettings
from sllmctl.control.events import EndOperation, Forget, FromNode, Operate
from sllmctl.planner.interface import Abilities
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import MIB, Agent, World, digest_of, spec

M = digest_of("m")
URL = "s3://bucket/models"


def ask(
    world: World,
    kind: OperationKind,
    url: str | None = None,
    node: str | None = None,
    tier: Tier | None = None,
    reference: str = M,
) -> Fault | None:
    return world.ask(lambda ticket: Operate(ticket, kind, reference, node, tier, url))


def ended(world: World) -> Fault | None:
    """How the operation that was asked for last has ended."""
    (operation,) = [one for one in world.view.operations.values() if one.ticket == world.tickets]
    assert operation.ended_at is not None
    return operation.fault


def two(make_world: MakeWorld, **means: Any) -> World:
    """Two nodes, one of them with the checkpoint of m."""
    agents = Agent("local"), Agent("far")
    agents[0].hold("m")
    world = make_world(*agents, **means)
    for agent in agents:
        world.connect(agent.name)
    return world


def published(make_world: MakeWorld, *urls: str) -> World:
    """Two nodes that may start from remotes; one has the checkpoint of m, which is served and published."""
    world = two(make_world, abilities=Abilities(published=True))
    world.serve(spec())
    for url in urls:
        ask(world, "publish", url)
    return world


def starting_from_two_remotes(make_world: MakeWorld) -> World:
    """The node with the checkpoint is lost, and the other begins to fetch it for a start."""
    world = published(make_world, URL, "file:///srv")
    assert ask(world, "drop", tier=Tier.DISK) is None
    world.lose("local")
    world.agents["far"].automatic = False
    world.demand("m", 1)
    return world


def where(world: World) -> list[str]:
    return [each.url for each in world.view.publications_of(M)]


def test_a_publish_is_remembered_and_a_fetch_finds_it(make_world: MakeWorld) -> None:
    world = two(make_world)
    assert ask(world, "publish", URL + "/") is None
    assert ended(world) is None
    assert next(one for one in world.agents["local"].heard if isinstance(one, Publish)).url == URL
    assert where(world) == [URL]
    world.check_rows()
    assert ask(world, "fetch") is None
    assert ended(world) is None
    fetch = next(one for one in world.agents["far"].heard if isinstance(one, Fetch))
    assert (fetch.url, fetch.layout, fetch.tier) == (URL, "exec1", Tier.DISK)
    assert set(world.view.nodes_with(M, Tier.DISK)) == {"local", "far"}
    assert world.reasons("checkpoint") == ["Publishing", "Published", "Fetching", "Fetched"]
    fault = ask(world, "fetch")
    assert fault is not None
    assert "on the disk of every node" in fault.message


def test_what_is_published_again_was_published_last_and_is_fetched_first(make_world: MakeWorld) -> None:
    world = two(make_world)
    for url in (URL, "file:///srv", URL):
        world.pass_time(10.0)
        assert ask(world, "publish", url) is None
    again = world.now
    world.pass_time(10.0)
    assert ask(world, "fetch", node="far") is None
    assert next(one for one in world.agents["far"].heard if isinstance(one, Fetch)).url == URL
    assert world.view.publications[M, URL].published_at == again, "a fetch publishes nothing"


def test_what_failed_is_not_remembered(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.agents["local"].automatic = False
    assert ask(world, "publish", URL) is None
    (op,) = world.agents["local"].ops
    world.tell("local", world.agents["local"].finish(op, Fault("unauthorised", "no access")))
    assert ended(world) == Fault("unauthorised", "no access")
    assert where(world) == []
    world.check_rows()


def test_an_operation_is_cancelled_also_over_a_broken_link(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.agents["local"].automatic = False
    assert ask(world, "publish", URL) is None
    (op,) = world.agents["local"].ops

    def cancel(name: str) -> str:
        fault = world.ask(lambda ticket: EndOperation(ticket, name))
        return fault.code if fault is not None else ""

    assert cancel("op_none") == "not_found"
    assert cancel(op) == ""
    assert world.view.operations[op].fault == Fault("cancelled", "it was cancelled")
    assert cancel(op) == "conflict"
    assert where(world) == []
    assert ask(world, "publish", URL) is None
    (op,) = world.agents["local"].ops
    world.lose("local")
    assert cancel(op) == ""
    assert world.view.operations[op].ended_at is None
    world.connect("local")
    assert world.view.operations[op].fault == Fault("cancelled", "it was cancelled")
    assert ask(world, "drop", tier=Tier.DISK) is None
    (op,) = world.agents["local"].ops
    assert cancel(op) == "conflict"
    world.check_rows()


def test_what_a_publish_mended_is_shown_and_a_copy_that_was_here_proves_no_remote(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.agents["local"].automatic = False
    assert ask(world, "publish", URL) is None
    (op,) = world.agents["local"].ops
    done = msgspec.structs.replace(world.agents["local"].finish(op)[-1], note="partition_0.bin was written anew")
    world.tell("local", [done])
    (event,) = [one for one in world.events if one.reason == "Published"]
    assert (event.level, "partition_0.bin was written anew" in event.message) == ("warning", True)
    assert world.view.operations[op].note == "partition_0.bin was written anew"
    assert ask(world, "fetch", "s3://bucket/other", "local") is None
    (op,) = world.agents["local"].ops
    world.tell("local", [OperationDone(op=op, digest=M)])  # it was there, and so nobody has looked at the remote
    assert ended(world) is None
    assert where(world) == [URL]


def test_the_last_copy_of_what_a_model_needs_may_leave_the_disks_once_it_is_published(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.serve(spec())
    fault = ask(world, "drop", tier=Tier.DISK)
    assert fault is not None
    assert "publish it to a remote" in fault.message
    assert ask(world, "publish", URL, reference="m") is None
    assert ask(world, "drop", tier=Tier.DISK) is None
    assert ended(world) is None
    assert not world.view.nodes_with(M, Tier.DISK)
    fault = world.ask(lambda ticket: Forget(ticket, M, "s3://bucket/other"))
    assert fault is not None
    assert fault.code == "not_found"
    assert world.ask(lambda ticket: Forget(ticket, "m", None)) is None
    assert where(world) == []
    assert M in world.view.checkpoints  # the model means it
    world.check_rows()


def test_a_remote_that_a_fetch_found_wrong_is_no_copy_until_it_was_published_or_fetched(make_world: MakeWorld) -> None:
    world = two(make_world)
    world.serve(spec())
    ask(world, "publish", URL)
    world.agents["far"].automatic = False
    for fault, doubt in (("unreachable", ""), ("invalid_checkpoint", "bytes are wrong"), ("not_found", "it is gone")):
        assert ask(world, "fetch", URL, "far") is None
        (op,) = world.agents["far"].ops
        world.tell("far", world.agents["far"].finish(op, Fault(fault, doubt)))
        assert [each.doubt for each in world.view.publications_of(M)] == [doubt]
        world.check_rows()
    refused = ask(world, "drop", node="local", tier=Tier.DISK)
    assert refused is not None
    assert "the last sound copy" in refused.message
    assert world.reasons("checkpoint").count("RemoteDoubted") == 1
    ask(world, "publish", URL)
    assert [each.doubt for each in world.view.publications_of(M)] == [""]
    world.check_rows()
    assert ask(world, "drop", node="local", tier=Tier.DISK) is None


def test_the_last_trace_of_a_checkpoint_is_where_it_was_published(make_world: MakeWorld) -> None:
    world = two(make_world)
    ask(world, "publish", URL)
    assert ask(world, "drop") is None
    assert ended(world) is None
    assert M in world.view.checkpoints
    assert not world.view.placements_of(M)
    world.check_rows()
    assert ask(world, "fetch", node="far") is None
    assert set(world.view.nodes_with(M, Tier.DISK)) == {"far"}
    assert ask(world, "drop") is None
    assert world.ask(lambda ticket: Forget(ticket, M, URL)) is None
    assert M not in world.view.checkpoints
    world.check_rows()


def test_a_checkpoint_of_another_cluster_is_fetched_by_its_whole_digest(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"))
    world.connect("local")
    for reference, url, code in (
        (M, None, "not_found"),
        (M[:10], URL, "not_found"),
        (M, "https://me:secret@h", "invalid_input"),
    ):
        fault = ask(world, "fetch", url, reference=reference)
        assert fault is not None
        assert fault.code == code
        assert "secret" not in fault.message
    assert ask(world, "fetch", URL) is None
    assert ended(world) is None
    assert set(world.view.nodes_with(M, Tier.DISK)) == {"local"}
    assert where(world) == [URL]
    world.check_rows()


def test_the_room_of_what_is_being_fetched_to_memory_is_promised_to_nobody_else(make_world: MakeWorld) -> None:
    agent = Agent("local", automatic=False)
    world = make_world(agent)
    world.connect("local")
    assert ask(world, "fetch", URL, tier=Tier.DRAM) is None
    agent.hold("m", image_mib=9)
    whole = agent.checkpoints.pop(M)

    def says(*placements: Placement, architecture: str = "") -> None:
        truth = msgspec.structs.replace(whole, architecture=architecture, placements=placements)
        world.tell("local", [PlacementUpdate(truth=truth)])
        world.check_rows()

    held = world.view.memory.arena_held_bytes
    dram = Placement(tier=Tier.DRAM, state=TierState.FILLING, size_bytes=9 * MIB, users=1)
    bad = Placement(tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=5 * MIB)
    says(dram)  # nobody here knows more of it than its size
    assert held["local"] == 10 * MIB, "in whole chunks"
    says()
    assert (held["local"], M in world.view.checkpoints) == (0, False)
    whole = msgspec.structs.replace(whole, image_bytes=0)
    says(bad)  # a copy that could never be read lies in its place
    whole = msgspec.structs.replace(whole, image_bytes=9 * MIB)
    says(bad, dram)
    assert held["local"] == 10 * MIB, "the fetch that repairs it says how large it is"
    says(whole.placements[0], msgspec.structs.replace(dram, state=TierState.RESIDENT), architecture="Tiny")
    assert held["local"] == 10 * MIB
    says(whole.placements[0], msgspec.structs.replace(dram, state=TierState.RESIDENT, users=0), architecture="Tiny")
    assert held["local"] == 0


def test_the_settings_name_a_remote(make_world: MakeWorld) -> None:
    world = two(make_world)
    fault = ask(world, "publish")
    assert fault is not None
    assert "control.remote" in fault.message
    agent = Agent("local")
    agent.hold("m")
    world = make_world(agent, settings=ControlSettings(remote="file:///srv/models"))
    world.connect("local")
    assert ask(world, "publish") is None
    assert where(world) == ["file:///srv/models"]


@pytest.mark.parametrize(("kind", "node", "code"), [("publish", "far", "conflict"), ("fetch", "nowhere", "not_found")])
def test_a_node_that_cannot_is_refused(make_world: MakeWorld, kind: OperationKind, node: str, code: str) -> None:
    fault = ask(two(make_world), kind, URL, node)
    assert fault is not None
    assert fault.code == code


def test_a_fetch_to_where_nobody_can_is_refused(make_world: MakeWorld) -> None:
    fault = ask(two(make_world), "fetch", URL, tier=Tier.DEVICE)
    assert fault is not None
    assert fault.code == "invalid_input"


def test_a_start_fetches_what_lies_on_a_remote_alone(make_world: MakeWorld) -> None:
    world = published(make_world, URL)
    assert ask(world, "drop", tier=Tier.DISK) is None
    assert ended(world) is None
    world.lose("local")
    world.demand("m", 1)
    world.settle()
    start = next(one for one in world.agents["far"].heard if isinstance(one, StartInstance))
    assert start.remote == RemoteCopy(url=URL, layout="exec1")
    instance = world.only()
    assert (instance.node, instance.source) == ("far", Tier.REMOTE)
    world.check_rows()


def test_a_start_whose_remote_is_down_tries_another(make_world: MakeWorld) -> None:
    world = starting_from_two_remotes(make_world)
    world.crash(world.only(), Fault("unreachable", "it is down"))
    world.pass_time(1.0)
    starts = [one for one in world.agents["far"].heard if isinstance(one, StartInstance)]
    assert {one.remote.url for one in starts[:2] if one.remote is not None} == {URL, "file:///srv"}


def test_a_start_whose_remote_is_wrong_tries_another_and_then_no_more(make_world: MakeWorld) -> None:
    world = starting_from_two_remotes(make_world)
    for tries in (1, 2):
        start = [one for one in world.agents["far"].heard if isinstance(one, StartInstance)][-1]
        assert start.remote is not None
        world.crash(world.only(), Fault("invalid_checkpoint", "bytes are wrong"), start.remote.url)
        world.pass_time(1.0)
        starts = [one for one in world.agents["far"].heard if isinstance(one, StartInstance)]
        assert len(starts) == 2, "both remotes, once each"
        assert sum(bool(each.doubt) for each in world.view.publications_of(M)) == tries
    assert {one.remote.url for one in starts if one.remote is not None} == {URL, "file:///srv"}
    world.check_rows()


def test_a_model_that_no_worker_can_run_says_nothing_of_its_remotes(make_world: MakeWorld) -> None:
    world = starting_from_two_remotes(make_world)
    world.crash(world.only(), Fault("invalid_checkpoint", "no such architecture can be run"))
    world.pass_time(1000.0)
    assert sum(isinstance(one, StartInstance) for one in world.agents["far"].heard) == 1
    assert [each.doubt for each in world.view.publications_of(M)] == ["", ""]
    assert world.only().state is InstanceState.FAILED


def test_a_start_where_the_weights_lie_fetches_nothing_and_one_of_what_lies_nowhere_is_refused(make_world: MakeWorld) -> None:
    world = published(make_world, URL)
    world.demand("m", 1)
    world.settle()
    start = next(one for one in world.agents["local"].heard if isinstance(one, StartInstance))
    assert start.remote is None
    assert not any(isinstance(one, StartInstance) for one in world.agents["far"].heard)
    world.ask(lambda ticket: Forget(ticket, "m", None))
    world.lose("local")
    world.pass_time(1000)
    world.demand("m", 1)
    world.settle()
    assert not any(isinstance(one, StartInstance) for one in world.agents["far"].heard)


def test_nothing_is_published_to_what_is_only_read(make_world: MakeWorld) -> None:
    world = two(make_world)
    fault = ask(world, "publish", "http://models.example/all")
    assert fault is not None
    assert (fault.code, "only read" in fault.message) == ("invalid_input", True)
    assert not any(isinstance(one, Publish) for one in world.agents["local"].heard)


def fetches(world: World) -> list[str]:
    """Where the far node was told to fetch from, in order."""
    return [one.url for one in world.agents["far"].heard if isinstance(one, Fetch)]


def fail(world: World, fault: Fault) -> None:
    (op,) = world.agents["far"].ops
    world.tell("far", world.agents["far"].finish(op, fault))


@pytest.mark.parametrize("code", ["unreachable", "not_found", "invalid_checkpoint", "internal"])
def test_a_fetch_for_which_no_remote_is_named_tries_them_in_order(make_world: MakeWorld, code: str) -> None:
    world = two(make_world)
    for url in ("s3://bucket/oldest", URL, "file:///srv"):
        ask(world, "publish", url)
        world.pass_time(1)
    world.agents["far"].automatic = False
    assert ask(world, "fetch", node="far") is None
    fail(world, Fault(code, "it is not there"))
    fail(world, Fault(code, "nor there"))
    assert fetches(world) == ["file:///srv", URL, "s3://bucket/oldest"]
    doubted = {each.url for each in world.view.publications_of(M) if each.doubt}
    assert doubted == ({URL, "file:///srv"} if code in ("not_found", "invalid_checkpoint") else set())
    (op,) = world.agents["far"].ops
    world.tell("far", world.agents["far"].finish(op))
    assert ended(world) is None
    assert world.reasons("checkpoint").count("FetchFailed") == 2
    world.check_rows()


def test_the_last_remote_that_fails_ends_a_fetch(make_world: MakeWorld) -> None:
    world = two(make_world)
    for url in (URL, "file:///srv"):
        ask(world, "publish", url)
    world.agents["far"].automatic = False
    assert ask(world, "fetch", node="far") is None
    fail(world, Fault("unreachable", "it is down"))
    fail(world, Fault("unreachable", "so is this"))
    assert ended(world) == Fault("unreachable", "so is this")
    assert len(fetches(world)) == 2


@pytest.mark.parametrize(("url", "code"), [(URL, "unreachable"), (None, "out_of_space"), (None, "cancelled")])
def test_a_fetch_that_was_named_a_remote_or_fails_for_the_nodes_sake_tries_no_other(
    make_world: MakeWorld, url: str | None, code: str
) -> None:
    world = two(make_world)
    for each in (URL, "file:///srv"):
        ask(world, "publish", each)
    world.agents["far"].automatic = False
    assert ask(world, "fetch", url, "far") is None
    fail(world, Fault(code, "it ends"))
    assert ended(world) == Fault(code, "it ends")
    assert len(fetches(world)) == 1


def break_before_it_hears(world: World, fault: Fault) -> None:
    """A try of the far node ends, and its link breaks before what the manager says to that has come."""
    agent = world.agents["far"]
    (op,) = [op for op, asked in agent.ops.items() if isinstance(asked, Fetch)]
    (end,) = agent.finish(op, fault)
    agent.connected = False
    world.do(FromNode("far", end))
    world.lose("far")


@pytest.mark.parametrize("code", ["unreachable", "not_found", "invalid_checkpoint"])
def test_the_end_of_a_try_that_is_told_again_is_not_that_of_the_next(make_world: MakeWorld, code: str) -> None:
    world = two(make_world)
    for url in ("s3://bucket/oldest", URL, "file:///srv"):
        ask(world, "publish", url)
        world.pass_time(1)
    agent = world.agents["far"]
    agent.automatic = False
    assert ask(world, "fetch", node="far") is None
    fault = Fault(code, "it is not there")
    break_before_it_hears(world, fault)
    world.connect("far")
    assert fetches(world) == ["file:///srv", URL], "the second is asked, not skipped"
    assert not agent.done
    fail(world, fault)
    assert fetches(world)[2:] == ["s3://bucket/oldest"], "an end of the second remote that is like the first's is one"
    (op,) = agent.ops
    world.tell("far", agent.finish(op))
    assert ended(world) is None
    doubted = {each.url for each in world.view.publications_of(M) if each.doubt}
    assert doubted == ({URL, "file:///srv"} if code != "unreachable" else set())
    world.check_rows()


def test_a_fetch_that_is_cancelled_before_its_second_try_is_heard_of_ends(make_world: MakeWorld) -> None:
    world = two(make_world)
    for url in (URL, "file:///srv"):
        ask(world, "publish", url)
    agent = world.agents["far"]
    agent.automatic = False
    assert ask(world, "fetch", node="far") is None
    (op,) = agent.ops
    break_before_it_hears(world, Fault("unreachable", "it is down"))
    assert world.ask(lambda ticket: EndOperation(ticket, op)) is None
    world.connect("far")
    assert isinstance(agent.heard[-1], CancelOperation)
    assert len(fetches(world)) == 1
    world.tell("far", [OperationDone(op=op, fault=Fault("cancelled", "it is not under way"))])
    assert world.view.operations[op].fault == Fault("cancelled", "it is not under way")


@pytest.mark.parametrize("quarantined", [False, True])
@pytest.mark.parametrize("code", ["invalid_checkpoint", "not_found"])
def test_a_copy_that_lies_here_and_cannot_be_loaded_says_nothing_of_the_remotes(
    make_world: MakeWorld, code: str, quarantined: bool
) -> None:
    world = two(make_world)
    for url in (URL, "file:///srv"):
        ask(world, "publish", url)
    agent = world.agents["local"]
    agent.automatic = False
    assert ask(world, "fetch", node="local", tier=Tier.DRAM) is None
    (op,) = agent.ops
    if quarantined:
        truth = agent.checkpoints[M]
        bad = Placement(tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=truth.image_bytes)
        world.tell("local", [PlacementUpdate(truth=msgspec.structs.replace(truth, placements=(bad,)))])
    world.tell("local", agent.finish(op, Fault(code, "its image is condemned")))
    assert ended(world) == Fault(code, "its image is condemned")
    assert [each.doubt for each in world.view.publications_of(M)] == ["", ""]
    assert sum(isinstance(one, Fetch) for one in agent.heard) == 1
    world.check_rows()


def test_a_copy_that_was_fetched_and_cannot_be_loaded_says_nothing_of_the_remotes(make_world: MakeWorld) -> None:
    world = two(make_world)
    for url in (URL, "file:///srv"):
        ask(world, "publish", url)
    agent = world.agents["far"]
    agent.automatic = False
    assert ask(world, "fetch", node="far", tier=Tier.DRAM) is None
    agent.hold("m")
    world.tell("far", [PlacementUpdate(truth=agent.checkpoints[M])])
    fail(world, Fault("invalid_checkpoint", "its image is condemned"))
    assert ended(world) == Fault("invalid_checkpoint", "its image is condemned")
    assert [each.doubt for each in world.view.publications_of(M)] == ["", ""]

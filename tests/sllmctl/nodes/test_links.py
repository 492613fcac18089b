"""Links over real sockets: handshake, truth, frames, files, and every way in which a connection goes wrong."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import force_setattr

from schema.errors import Conflict, Fault, InvalidInput, LinkError, NotFound, TimedOut, Unreachable
from schema.ids import EpochCounter, epoch_of, system_ids
from schema.link import (
    Acked,
    AttemptTruth,
    Ended,
    InstanceTruth,
    InstanceUpdate,
    NodeTruth,
    OperationDone,
    Ping,
    Pong,
    Role,
    SamplingParams,
    Shutdown,
    StartPhases,
    StopInstance,
    Submit,
    TokenRun,
    Tokens,
    TruthEnd,
    Welcome,
)
from schema.spec import ModelSpec, PathSource
from schema.states import EndReason, InstanceState, ModelState
from sllmctl.control.effects import ModelChanged, RouteChanged
from sllmctl.control.events import Event, FromNode, NodeLost
from sllmctl.gateway.router import Router
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.nodes.links import Links, parse_address
from sllmctl.nodes.settings import LinkSettings
from tests.sllmctl.nodes.fake_agent import WAIT_S, FakeAgent, Recorder, fake_agent, node_truth, serve_files, welcome

SUBMIT = Submit(
    attempt=epoch_of(1, 1), instance="i", instance_epoch=epoch_of(1, 1), request="r", model="m", prompt=(1,),
    params=SamplingParams(max_tokens=4),
)  # fmt: skip


@asynccontextmanager
async def links_to(agent: FakeAgent, recorder: Recorder, settings: LinkSettings | None = None) -> AsyncIterator[Links]:
    links = Links(
        cluster="c",
        generation=4,
        software="test",
        router=recorder,
        post=recorder.post,
        settings=settings or LinkSettings(redial_longest_s=0.05, refused_retry_s=0.05),
    )
    links.connect("n", agent.address)
    try:
        yield links
    finally:
        await links.close()


async def test_the_handshake_names_the_manager_and_the_truth_reaches_router_and_loop(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link(None, AttemptTruth(submit=SUBMIT))
        hello = peer.hello
        assert hello is not None
        assert (hello.role, hello.cluster, hello.generation, hello.node) == (Role.MANAGER, "c", 4, "n")
        await links.ready("n", WAIT_S)
        kinds = [item if isinstance(item, tuple) else type(item) for item in recorder.heard]
        assert kinds == [("began", "n"), ("attempt", SUBMIT.attempt), FromNode, ("ended", 1)]
        links.send("n", SUBMIT)
        assert await peer.expect(Submit) == SUBMIT


async def test_nothing_is_sent_before_the_truth_is_complete(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.accept()
        links.send("n", SUBMIT)
        peer.say(welcome(), node_truth(), Ping(nonce=3))
        assert await peer.expect(Pong) == Pong(nonce=3)
        links.send("n", SUBMIT)
        assert not links.is_up("n")
        peer.say(TruthEnd(attempts=0))
        await links.ready("n", WAIT_S)
        links.send("n", StopInstance(instance="i", epoch=epoch_of(1, 1)))
        await peer.expect(StopInstance)


async def test_tokens_go_to_the_router_batch_by_batch_and_news_to_both(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        recorder.heard.clear()
        frames = [Tokens(frame=n, runs=(TokenRun(SUBMIT.attempt, n - 1, (7,)),)) for n in (1, 2)]
        truth = InstanceTruth(
            instance="i", epoch=epoch_of(1, 1), digest="d", state=InstanceState.READY, phases=StartPhases(total_s=1.0)
        )
        peer.say(*frames)
        await recorder.until(lambda item: item == ("batch", "n"))
        peer.say(InstanceUpdate(truth=truth), OperationDone(op="o"))
        assert await recorder.until(lambda item: item == ("progress ended", "i"))
        assert await recorder.until(lambda item: item == ("started", "i"))
        assert await recorder.until(FromNode) == FromNode("n", InstanceUpdate(truth=truth))
        assert await recorder.until(lambda item: item == ("progress ended", "o"))
        assert await recorder.until(FromNode) == FromNode("n", OperationDone(op="o"))


async def test_a_broken_link_is_told_and_dialled_again(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        peer.close()
        await recorder.until(lambda item: item == ("lost", "n"))
        lost = await recorder.until(NodeLost)
        assert lost.node == "n"
        await agent.link()
        await links.ready("n", WAIT_S)


async def test_an_agent_that_is_not_there_is_dialled_until_it_is(short_dir: Path) -> None:
    recorder = Recorder()
    agent = FakeAgent(short_dir / "a.sock")
    async with links_to(agent, recorder, LinkSettings(unreachable_after_s=0.0, redial_longest_s=0.02)) as links:
        assert "cannot reach" in (await recorder.until(NodeLost)).why
        with pytest.raises(TimedOut, match="cannot reach"):
            await links.ready("n", 0.05)
        await agent.start()
        await agent.link()
        await links.ready("n", WAIT_S)
        await agent.stop()


async def test_a_stale_socket_file_is_only_an_agent_that_is_not_there(short_dir: Path) -> None:
    path = short_dir / "a.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    recorder = Recorder()
    agent = FakeAgent(path)
    async with links_to(agent, recorder, LinkSettings(unreachable_after_s=0.0)):
        assert "refused" in (await recorder.until(NodeLost)).why


async def test_a_refusal_is_an_error_of_its_own_and_is_said_once(short_dir: Path) -> None:
    recorder = Recorder()
    fault = Fault("conflict", "this agent belongs to cluster x")
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        await agent.refuse(fault)
        with pytest.raises(Conflict, match="belongs to cluster x"):
            await links.ready("n", WAIT_S)
        await agent.refuse(fault)
        await agent.refuse(fault)
        assert sum(isinstance(item, NodeLost) for item in recorder.heard) == 1
        await agent.link()
        async with asyncio.timeout(WAIT_S):
            while not links.is_up("n"):
                await recorder.until(FromNode)


async def test_an_agent_that_is_shutting_down_is_dialled_again_soon_and_is_no_error(short_dir: Path) -> None:
    settings = LinkSettings(redial_longest_s=0.05, refused_retry_s=3600)
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, Recorder(), settings) as links:
        ready = asyncio.create_task(links.ready("n", WAIT_S))
        await agent.refuse(Fault("unreachable", "this agent is shutting down"))
        await agent.link()
        await ready


@pytest.mark.parametrize(
    "words",
    [
        [b"\x00\x00\x00\x03abc"],
        [b"\xff\xff\xff\xff"],
        [welcome(), TruthEnd(attempts=0)],
        [welcome(), welcome()],
        [node_truth()],
        [Welcome(protocol=99, software="f", node="n", pid=1)],
        [welcome(), node_truth(), Tokens(frame=1)],
        [welcome(), node_truth(), TruthEnd(attempts=2)],
        [welcome(), node_truth(), TruthEnd(attempts=0), node_truth()],
        [welcome(), node_truth(), TruthEnd(attempts=0), AttemptTruth(submit=SUBMIT)],
    ],
    ids=["garbage", "oversized", "no-truth", "two-welcomes", "no-welcome", "version", "early", "count", "twice", "late"],
)
async def test_a_peer_that_breaks_the_protocol_is_closed_and_dialled_again(short_dir: Path, words: list[object]) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.accept()
        for word in words:
            if isinstance(word, bytes):
                peer.say_bytes(word)
            else:
                peer.say(word)  # type: ignore[arg-type]
        await peer.gone()
        await agent.link()
        await links.ready("n", WAIT_S)


async def test_a_link_error_of_the_router_closes_the_connection(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        recorder.fail_on = LinkError
        peer.say(Tokens(frame=1))
        assert "a gap" in (await recorder.until(NodeLost)).why
        recorder.fail_on = None
        await agent.link()
        await links.ready("n", WAIT_S)


async def test_a_silent_node_is_asked_and_then_given_up(short_dir: Path) -> None:
    recorder = Recorder()
    settings = LinkSettings(heartbeat_s=0.02, heartbeat_timeout_s=60.0)
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder, settings) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        ping = await peer.expect(Ping)
        peer.say(Pong(nonce=ping.nonce))
        force_setattr(settings, "heartbeat_timeout_s", 0.05)
        assert "silent" in (await recorder.until(NodeLost)).why


async def test_a_truth_that_does_not_come_is_not_waited_for_without_end(short_dir: Path) -> None:
    recorder = Recorder()
    async with (
        fake_agent(short_dir / "a.sock") as agent,
        links_to(agent, recorder, LinkSettings(truth_timeout_s=0.05)) as links,
    ):
        peer = await agent.accept()
        peer.say(welcome())
        await peer.gone()
        await recorder.until(lambda item: item == ("lost", "n"))
        with pytest.raises(TimedOut, match="truth_timeout_s"):
            await links.ready("n", 0.02)


async def test_a_node_that_does_not_read_is_given_up(short_dir: Path) -> None:
    recorder = Recorder()
    settings = LinkSettings(max_unsent_bytes=1 << 16)
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder, settings) as links:
        await agent.link()
        await links.ready("n", WAIT_S)
        big = Submit(
            attempt=epoch_of(1, 2), instance="i", instance_epoch=epoch_of(1, 1), request="r", model="m",
            prompt=(100_000,) * 200_000, params=SamplingParams(max_tokens=4),
        )  # fmt: skip
        for _ in range(4):
            links.send("n", big)
        assert "does not read" in (await recorder.until(NodeLost)).why


async def test_files_are_read_part_by_part(short_dir: Path) -> None:
    recorder = Recorder()
    data = bytes(range(256)) * 10
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder, LinkSettings(max_file_bytes=5000)) as links:
        with pytest.raises(Unreachable):
            await links.read_file("n", "d", "f")
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        serving = asyncio.create_task(serve_files(peer, {"f": data, "big": b"x" * 5001, "empty": b""}, part_bytes=999))
        assert await links.read_file("n", "d", "f") == data
        assert await links.read_file("n", "d", "empty") == b""
        with pytest.raises(LinkError, match="limit is 5000"):
            await links.read_file("n", "d", "big")
        with pytest.raises(NotFound):
            await links.read_file("n", "d", "none")
        peer.close()
        await serving


async def test_a_file_that_does_not_come_is_not_waited_for_without_end(short_dir: Path) -> None:
    recorder = Recorder()
    async with (
        fake_agent(short_dir / "a.sock") as agent,
        links_to(agent, recorder, LinkSettings(read_file_timeout_s=0.02)) as links,
    ):
        await agent.link()
        await links.ready("n", WAIT_S)
        with pytest.raises(TimedOut):
            await links.read_file("n", "d", "f")


async def test_a_file_is_given_up_with_its_link(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        reading = asyncio.create_task(links.read_file("n", "d", "f"))
        await peer.hear()
        peer.close()
        with pytest.raises(Unreachable):
            await reading


async def test_disconnect_closes_for_good(short_dir: Path) -> None:
    recorder = Recorder()
    async with fake_agent(short_dir / "a.sock") as agent, links_to(agent, recorder) as links:
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        links.disconnect("n")
        links.disconnect("n")
        await peer.gone()
        assert not links.is_up("n")
        links.send("n", Shutdown())
        with pytest.raises(Unreachable):
            await links.ready("n", 1)
        assert agent.accepted == 1


@pytest.mark.parametrize("address", ["ssh:host", "/run/a.sock", "unix:relative", "unix:/" + "x" * 120])
def test_addresses_that_cannot_be_dialled_are_refused(address: str) -> None:
    with pytest.raises(InvalidInput):
        parse_address(address)


async def test_a_stream_goes_through_a_lost_link_unbroken(short_dir: Path) -> None:
    """Router and links together: tokens, a broken connection in the middle, the truth, the rest, one end, acknowledged."""
    posted: list[Event] = []
    counter = EpochCounter(2)
    router = Router(
        send=lambda node, message: links.send(node, message),
        post=posted.append,
        epochs=counter,
        ids=system_ids,
        settings=RouterSettings(),
    )
    links = Links(
        cluster="c", generation=2, software="t", router=router, post=posted.append, settings=LinkSettings(redial_longest_s=0.05)
    )
    async with fake_agent(short_dir / "a.sock") as agent:
        links.connect("n", agent.address)
        peer = await agent.link()
        await links.ready("n", WAIT_S)
        router.model_changed(ModelChanged("m", ModelSpec(name="m", source=PathSource("/m")), ModelState.DEPLOYED, "d", 100))
        router.route_changed(RouteChanged("m", "n", "i", epoch_of(2, 0), InstanceState.READY, True, 0, 0, 8, "n"))
        request = router.submit("m", (1, 2), SamplingParams(max_tokens=4))
        submit = await peer.expect(Submit)
        peer.say(Tokens(frame=1, runs=(TokenRun(submit.attempt, 0, (10, 11)),)))
        sequence = request.sequences[0]
        async with asyncio.timeout(WAIT_S):
            await sequence.wait(1)
        peer.close()
        peer = await agent.link(None, AttemptTruth(submit=submit, new_ids=(10, 11, 12)))
        async with asyncio.timeout(WAIT_S):
            await sequence.wait(2)
        ended = Ended(attempt=submit.attempt, position=4, reason=EndReason.LENGTH)
        peer.say(Tokens(frame=1, runs=(TokenRun(submit.attempt, 2, (12, 13)),), ends=(ended,)))
        assert await peer.expect(Acked) == Acked(frame=1, ends=(submit.attempt,))
        assert (sequence.tokens, sequence.finish) == ([10, 11, 12, 13], EndReason.LENGTH)
        truths = [event for event in posted if isinstance(event, FromNode) and isinstance(event.message, NodeTruth)]
        assert len(truths) == 2
        await links.close()

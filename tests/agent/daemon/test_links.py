"""Who may talk to an agent, and what becomes of those who talk nonsense."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.daemon import server
from agent.daemon.connection import Connection
from agent.daemon.identity import Identity, IdentityFile
from schema.errors import InvalidInput
from schema.ids import epoch_of
from schema.link import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    AgentMessage,
    Forked,
    Hello,
    Ping,
    Pong,
    Refused,
    Role,
    Submit,
    TokenRun,
    Tokens,
    Welcome,
    encode_frame,
)
from schema.states import InstanceState
from tests.agent.daemon.peers import WAIT_S, Node, Peer, hello, start_instance, submit


async def stranger(node: Node) -> Peer:
    peer = Peer(AgentMessage)
    node.strangers.append(peer)
    await peer.dial(node.config.socket_path, None)
    return peer


async def still_serves(node: Node) -> None:
    assert (await node.manager(generation=1000)).truth.node == "n1"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" * 10, id="another protocol"),
        pytest.param((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), id="an oversized frame"),
        pytest.param((1 << 20).to_bytes(4, "big"), id="an oversized hello"),
        pytest.param((5).to_bytes(4, "big") + b"\xff" * 5, id="no msgpack"),
        pytest.param((0).to_bytes(4, "big"), id="an empty frame"),
        pytest.param(encode_frame(Ping(nonce=1)), id="no hello"),
    ],
)
async def test_garbage_for_a_hello_ends_that_connection_only(node: Node, data: bytes) -> None:
    manager = await node.manager()
    peer = await stranger(node)
    peer.send_raw(data)
    await peer.hangup()
    assert not any(isinstance(message, Welcome) for message in peer.seen)
    manager.send(Ping(nonce=7))
    assert (await manager.take(Pong)).nonce == 7


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0\0\5\xff\xff\xff\xff\xff", id="garbage"),
        pytest.param((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), id="oversized"),
        pytest.param(encode_frame(Forked(nonce=1)), id="a message of another role"),
    ],
)
async def test_garbage_from_a_manager_ends_its_connection_and_no_instance(node: Node, data: bytes) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send_raw(data)
    await manager.hangup()
    again = await node.manager()
    assert [(i.instance, i.state, i.pid) for i in again.truth.instances] == [(start.instance, InstanceState.READY, worker.pid)]


async def test_garbage_from_a_worker_ends_its_connection_and_it_comes_back(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    worker.peer.send_raw(b"\0\0\0\1\xc1")
    await node.until(lambda: worker.peer.ended)
    await worker.redial()
    manager.send(submit(epoch_of(1, 9), start))
    await worker.hear(Submit)


async def test_a_hello_in_pieces_and_frames_behind_it_are_read(node: Node) -> None:
    await node.manager()
    peer = await stranger(node)
    words = hello(Role.MANAGER, cluster="c1", generation=1, node="n1")
    for byte in encode_frame(words):
        peer.send_raw(bytes([byte]))
    peer.send(Ping(nonce=3))
    assert (await peer.take(Pong)).nonce == 3


async def test_without_descriptors_diallers_wait_and_the_loop_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries, heard = socket.socket.accept, [], asyncio.Event()

    def accept(listener: socket.socket) -> Any:
        tries.append(listener)
        if len(tries) <= 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(listener)

    def admit(connection: Connection, hello: Hello) -> None:
        heard.set()
        connection.close("it was heard")

    monkeypatch.setattr(socket.socket, "accept", accept)
    for again_s in (3600.0, 0.001):
        monkeypatch.setattr(server, "_AGAIN_S", again_s)
        served = server.Server(tmp_path / "agent.sock", admit)
        served.listen()
        with socket.socket(socket.AF_UNIX) as dialler:
            dialler.connect(str(tmp_path / "agent.sock"))
            dialler.sendall(encode_frame(hello(Role.STORE)))
            for _ in range(100):
                await asyncio.sleep(0)
            if again_s > 1:
                assert len(tries) == 1
            else:
                await asyncio.wait_for(heard.wait(), WAIT_S)
                assert len(tries) == 3
        served.close()


@pytest.mark.parametrize("role", [Role.STORE, Role.ZYGOTE, Role.WORKER])
async def test_kin_with_a_wrong_token_is_refused(node: Node, role: Role) -> None:
    peer = await stranger(node)
    peer.send(hello(role, token="wrong", instance="inst_1"))
    assert (await peer.take(Refused)).fault.code == "unauthorised"
    await still_serves(node)


async def test_a_version_that_is_too_new_or_too_old_is_refused_naming_who_is_to_be_upgraded(node: Node) -> None:
    for oldest, newest, who in ((PROTOCOL + 1, PROTOCOL + 2, "this agent"), (0, 0, "the manager")):
        manager = await node.dial_manager(protocol_oldest=oldest, protocol=newest)
        fault = (await manager.take(Refused)).fault
        assert fault.code == "link_error"
        assert f"upgrade {who}" in fault.message
    newer = await node.dial_manager(protocol=PROTOCOL + 2)
    assert (await newer.take(Welcome)).protocol == PROTOCOL


async def test_an_older_generation_another_cluster_and_another_name_are_refused(node: Node) -> None:
    manager = await node.manager(generation=5)
    wrong: list[dict[str, Any]] = [{"generation": 4}, {"cluster": "c2", "generation": 9}, {"node": "n2", "generation": 9}]
    for fields in wrong:
        refused = await node.dial_manager(**fields)
        assert (await refused.take(Refused)).fault.code == "conflict"
        await refused.hangup()
    manager.send(Ping(nonce=1))
    await manager.take(Pong)
    assert IdentityFile(node.directory / "data" / "identity.json").identity == Identity("n1", "c1", 5)


async def test_a_manager_without_a_name_for_the_node_is_refused(node: Node) -> None:
    refused = await node.dial_manager(node="")
    assert (await refused.take(Refused)).fault.code == "invalid_input"


async def test_a_newer_manager_supersedes_the_older(node: Node) -> None:
    old = await node.manager(generation=1)
    new = await node.manager(generation=2)
    await old.hangup()
    new.send(Ping(nonce=1))
    await new.take(Pong)


async def test_a_manager_that_speaks_before_it_has_the_truth_is_hung_up_on() -> None:
    node = Node(adopt_s=60)
    node.kin_dial = False
    async with node:
        manager = await node.dial_manager()
        await manager.take(Welcome)
        manager.send(Ping(nonce=2))
        await manager.take(Pong)
        manager.send(start_instance())
        await manager.hangup()


async def test_two_workers_cannot_be_one(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    for fields in ({"nonce": worker.fork.nonce + 1}, {"nonce": worker.fork.nonce, "epoch": epoch_of(1, 99)}):
        peer = await stranger(node)
        words = {"pid": worker.pid, "instance": start.instance, "epoch": start.epoch} | fields
        peer.send(node.kin_hello(Role.WORKER, **words))
        assert (await peer.take(Refused)).fault.code == "not_found"
    peer = await stranger(node)
    peer.send(node.kin_hello(Role.WORKER, instance=start.instance, epoch=start.epoch, nonce=worker.fork.nonce))
    assert (await peer.take(Refused)).fault.code == "conflict"


async def test_a_gap_in_tokens_ends_the_link_and_the_truth_repairs_it(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    attempt = epoch_of(1, 9)
    manager.send(submit(attempt, start))
    await worker.hear(Submit)
    worker.generated[attempt] = [4, 5]
    worker.peer.send(Tokens(frame=1, runs=(TokenRun(attempt, 2, (6,)),)))
    await node.until(lambda: worker.peer.ended)
    await worker.redial()
    frame = await manager.take(Tokens)
    assert frame.runs == (TokenRun(attempt, 0, (4, 5)),)


async def test_socket_and_directories_are_private_and_a_stale_socket_is_replaced() -> None:
    node = Node()
    node.config.socket_path.touch()
    node.config.socket_path.unlink()
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(node.config.socket_path))
    async with node:
        await still_serves(node)
        assert stat.S_IMODE(node.config.socket_path.stat().st_mode) == 0o600
    assert not node.config.socket_path.exists()


def test_an_unreadable_identity_is_refused_with_what_to_do(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "identity.json"
    path.write_text("{")
    with pytest.raises(InvalidInput, match="unclaim"):
        IdentityFile(path)


async def test_many_silent_diallers_do_not_keep_a_manager_out(node: Node) -> None:
    for _ in range(40):
        await stranger(node)
    await still_serves(node)

"""The dialler's end of a link: an agent that goes away, in whatever moment, costs its kin nothing but that connection."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.channel import Channel
from schema.link import PROTOCOL, Descriptors, FrameDecoder, Hello, Message, Ping, Pong, Role, ToWorker, Welcome, encode_frame

HELLO = Hello(role=Role.WORKER, software="test", pid=1)
WELCOME = Welcome(protocol=PROTOCOL, software="test", node="", pid=1)
LONG_S = 60.0


class Agent:
    """Listens at the known socket; each `life` is one accepted connection."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(LONG_S)

    def life(self, *messages: Message, descriptors: tuple[int, ...] = ()) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(LONG_S)
        assert isinstance(_frames(connection, Hello)[0], Hello)
        socket.send_fds(connection, [b"".join(map(encode_frame, (WELCOME, *messages)))], descriptors)
        return connection


def _frames(connection: socket.socket, kind: object) -> list[Message]:
    decoder: FrameDecoder[Message] = FrameDecoder(kind)
    while not (messages := decoder.feed(connection.recv(1 << 16))):
        pass
    return messages


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "a")
    yield made
    made.listener.close()


@pytest.fixture
def channel(tmp_path: Path, agent: Agent) -> Iterator[Channel[ToWorker]]:
    made: Channel[ToWorker] = Channel(tmp_path / "a", HELLO, ToWorker)
    assert made.poll(0.0) == []
    yield made
    made.close(0.0)


def fill(channel: Channel[ToWorker]) -> None:
    """Say more than the socket takes."""
    while not channel.backlog:
        channel.send(Descriptors(what="x" * (1 << 18)))


def test_an_agent_that_dies_while_it_reads_nothing_is_dialled_again(agent: Agent, channel: Channel[ToWorker]) -> None:
    first = agent.life()
    assert channel.poll(LONG_S) == [WELCOME]
    fill(channel)
    first.close()
    while channel.connected:
        assert channel.poll(0.0) == []
    assert channel.backlog == 0
    while not select.select([agent.listener], [], [], 0.0)[0]:
        assert channel.poll(0.01) == []
    second = agent.life()
    assert channel.poll(LONG_S) == [WELCOME]
    channel.send(Pong(nonce=7))
    assert _frames(second, Pong) == [Pong(nonce=7)]
    second.close()


def test_what_an_agent_said_last_is_heard_with_its_descriptors(agent: Agent, channel: Channel[ToWorker]) -> None:
    reading, writing = os.pipe()
    said = (Ping(nonce=1), Descriptors(what="arena-ro"))
    first = agent.life(*said, descriptors=(reading,))
    assert channel.poll(LONG_S) == [WELCOME, *said]
    # It dies before the answer to the first of them; what came with the second is here all the same.
    first.close()
    channel.send(Pong(nonce=1))
    (taken,) = channel.take_descriptors(1)
    assert os.fstat(taken).st_ino == os.fstat(reading).st_ino
    for descriptor in (taken, reading, writing):
        os.close(descriptor)
    while channel.connected:
        assert channel.poll(0.0) == []


def test_what_cannot_be_read_is_logged_once(agent: Agent, channel: Channel[ToWorker], caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        life = agent.life(HELLO)
        while channel.poll(0.01) or not select.select([agent.listener], [], [], 0.0)[0]:
            pass
        life.close()
    (record,) = caplog.records
    assert "the link to the agent is dropped" in record.message
    assert "is not a message of this link" in record.message

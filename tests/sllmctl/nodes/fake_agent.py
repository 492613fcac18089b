"""An agent's end of the link for tests: it speaks schema.link on a real socket and does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from schema.errors import Fault
from schema.ids import Epoch
from schema.link import (
    PROTOCOL,
    ArenaInfo,
    AttemptTruth,
    FileChunk,
    FrameDecoder,
    Hello,
    Inventory,
    ManagerMessage,
    Message,
    NodeTruth,
    Ping,
    Pong,
    Progress,
    ReadFile,
    Refused,
    StartPhases,
    Tokens,
    TruthEnd,
    Welcome,
    encode_frame,
)
from sllmctl.control.events import Event

M = TypeVar("M")
WAIT_S = 60.0


def node_truth(node: str = "n", **more: Any) -> NodeTruth:
    arena = ArenaInfo(id="a", budget_bytes=1 << 20, chunk_bytes=1 << 12)
    return NodeTruth(node=node, inventory=Inventory(hostname="h", cpus=1, memory_bytes=1, devices=(), arena=arena), **more)


class Peer:
    """One accepted connection; ``hello`` is what it began with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: FrameDecoder[Any] = FrameDecoder(Hello | ManagerMessage)
        self._ready: list[Any] = []
        self.hello: Hello | None = None

    def say(self, *messages: Message) -> None:
        self._writer.write(b"".join(encode_frame(message) for message in messages))

    def say_bytes(self, data: bytes) -> None:
        self._writer.write(data)

    async def hear(self) -> Any:
        """The next message. Raises EOFError at the end of the connection."""
        while not self._ready:
            async with asyncio.timeout(WAIT_S):
                data = await self._reader.read(1 << 16)
            if not data:
                raise EOFError
            self._ready = self._decoder.feed(data)
        return self._ready.pop(0)

    async def expect(self, kind: type[M]) -> M:
        message = await self.hear()
        assert isinstance(message, kind), message
        return message

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        try:
            while True:
                await self.hear()
        except (EOFError, ConnectionError):
            pass

    def close(self) -> None:
        self._writer.transport.abort()


class FakeAgent:
    """Serves ``path``; connections come out of `accept`. With ``files`` it answers ReadFile by itself, see `serve`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.accepted = 0
        self._all: list[Peer] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._accepted, self.path)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await _turns()  # a connection that was taken before comes to `_accepted` meanwhile
            for peer in self._all:
                peer.close()
            await _turns()
            await self._server.wait_closed()
            self._server = None
            self.path.unlink(missing_ok=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.accepted += 1
        self._all.append(peer)
        self.peers.put_nowait(peer)

    async def accept(self) -> Peer:
        """The next connection, its Hello read."""
        async with asyncio.timeout(WAIT_S):
            peer = await self.peers.get()
        peer.hello = await peer.expect(Hello)
        return peer

    async def link(self, truth: NodeTruth | None = None, *attempts: AttemptTruth) -> Peer:
        """Accept, welcome, and state a truth."""
        peer = await self.accept()
        stated = truth or node_truth()
        peer.say(welcome(), stated, *attempts, TruthEnd(attempts=len(attempts)))
        return peer

    async def refuse(self, fault: Fault) -> None:
        peer = await self.accept()
        peer.say(Refused(fault=fault))
        await peer.gone()


async def _turns() -> None:
    """Let the event loop carry out what it has begun, which takes it a few turns and no time."""
    for _ in range(10):
        await asyncio.sleep(0)


def welcome() -> Welcome:
    return Welcome(protocol=PROTOCOL, software="fake", node="n", pid=1)


async def serve_files(peer: Peer, files: dict[str, bytes], part_bytes: int = 1 << 20) -> None:
    """Answer ReadFile from ``files`` until the connection ends; unknown names with NotFound."""
    try:
        while True:
            message = await peer.hear()
            if isinstance(message, Ping):
                peer.say(Pong(nonce=message.nonce))
            elif isinstance(message, ReadFile):
                op, file, offset = message.op, message.file, message.offset_bytes
                data = files.get(file)
                if data is None:
                    fault = Fault("not_found", f"there is no {file}")
                    peer.say(FileChunk(op=op, file=file, offset_bytes=offset, size_bytes=0, data=b"", fault=fault))
                else:
                    part = data[offset : offset + part_bytes]
                    peer.say(FileChunk(op=op, file=file, offset_bytes=offset, size_bytes=len(data), data=part))
    except (EOFError, ConnectionError):
        pass


class Recorder:
    """A LinkListener, and a place for posted events: everything in one list, in order; `until` waits for some of it."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.fail_on: type[BaseException] | None = None
        self._changed = asyncio.Event()

    def post(self, event: Event) -> None:
        self._add(event)

    def _add(self, *what: Any) -> None:
        self.heard.append(what[0] if len(what) == 1 else what)
        self._changed.set()

    async def until(self, wanted: Any) -> Any:
        """The first heard item for which ``wanted`` (a type, or a predicate) holds; it and all before it are dropped."""
        test = (lambda item: isinstance(item, wanted)) if isinstance(wanted, type) else wanted
        async with asyncio.timeout(WAIT_S):
            while True:
                for index, item in enumerate(self.heard):
                    if test(item):
                        del self.heard[: index + 1]
                        return item
                self._changed.clear()
                await self._changed.wait()

    def truth_began(self, node: str, truth: NodeTruth) -> None:
        self._add("began", node)

    def attempt_truth(self, node: str, truth: AttemptTruth) -> None:
        self._add("attempt", truth.submit.attempt)

    def truth_ended(self, node: str, end: TruthEnd) -> None:
        self._add("ended", end.attempts)

    def tokens(self, node: str, tokens: Tokens) -> None:
        if self.fail_on is not None:
            raise self.fail_on("a gap")
        self._add(tokens)

    def batch_ended(self, node: str) -> None:
        self._add("batch", node)

    def instance_load_changed(self, node: str, load: Any) -> None:
        self._add(load)

    def instance_started(self, instance: str, epoch: Epoch, phases: StartPhases) -> None:
        self._add("started", instance)

    def progressed(self, node: str, progress: Progress) -> None:
        self._add(progress)

    def progress_ended(self, op: str) -> None:
        self._add("progress ended", op)

    def link_lost(self, node: str) -> None:
        self._add("lost", node)


@asynccontextmanager
async def fake_agent(path: Path) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent(path)
    await agent.start()
    try:
        yield agent
    finally:
        await agent.stop()

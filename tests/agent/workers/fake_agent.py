"""The agent's end of the link, written by hand: it listens, welcomes, says what a test tells it to, and keeps what it hears."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.config import NodeConfig
from schema.checkpoint import ALIGN_BYTES, Manifest, Partition, TensorEntry, encode_manifest
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import (
    PROTOCOL,
    Arriving,
    Attach,
    AttemptTruth,
    Descriptors,
    EngineOptions,
    Extent,
    Fork,
    Forked,
    FrameDecoder,
    Hello,
    Message,
    Refused,
    Role,
    StartInstance,
    StartWorker,
    Tokens,
    TruthEnd,
    Welcome,
    WorkerMessage,
    WorkerTruth,
    ZygoteMessage,
    ZygoteTruth,
    encode_frame,
)
from tests.agent.engine.models import make_model, manifest_of, tensors_of

TIMEOUT_S = 120.0
LONG = 1 << 16
"""Tokens that no worker generates before a test that the machine lets wait has gone on."""
M = TypeVar("M", bound=Message)
DIGEST = "ab" * 32


class Peer:
    """One connection that was welcomed, or is about to be."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder: FrameDecoder[Any] = FrameDecoder(Hello | WorkerMessage | ZygoteMessage)
        self._heard: deque[Any] = deque()
        sock.settimeout(TIMEOUT_S)

    def send(self, *messages: Message, descriptors: tuple[int, ...] = ()) -> None:
        socket.send_fds(self._socket, [b"".join(encode_frame(message) for message in messages)], list(descriptors))

    def next(self) -> Any:
        """The next message. Raises EOFError when the other side has closed, TimeoutError when it is silent."""
        while not self._heard:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the other side has closed")
            self._heard.extend(self._decoder.feed(data))
        return self._heard.popleft()

    def expect(self, kind: type[M]) -> M:
        """The next message of a kind; those before it are passed over."""
        while True:
            message = self.next()
            if isinstance(message, kind):
                return message

    def expect_closed(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            try:
                while True:
                    self.next()
            except EOFError:
                return

    def close(self) -> None:
        self._socket.close()


class Heard:
    """Tokens and ends as a receiver keeps them: a run that leaves a gap, or a second end, is an error."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Any] = {}

    def take(self, message: Tokens) -> None:
        for run in message.runs:
            known = self.tokens.setdefault(run.attempt, [])
            assert run.start <= len(known)
            known[run.start :] = run.ids
        for end in message.ends:
            assert end.attempt not in self.ends
            assert end.position == len(self.tokens.get(end.attempt, ()))
            self.ends[end.attempt] = end

    def state(self, truth: AttemptTruth) -> None:
        attempt = truth.submit.attempt
        self.tokens[attempt] = [*truth.submit.generated, *truth.new_ids]
        if truth.end is not None:
            self.ends[attempt] = truth.end

    def until_ended(self, peer: Peer, *attempts: int) -> None:
        while any(attempt not in self.ends for attempt in attempts):
            self.take(peer.expect(Tokens))


class Node:
    """A run directory, a checkpoint in memory, and the agent's socket; `zygote` starts the real process."""

    def __init__(self, agent_grace_s: float = 300.0, model: str = "llama") -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        self.config = NodeConfig(
            run_dir=str(self.directory), data_dir=str(self.directory / "data"), threads=1, agent_grace_s=agent_grace_s
        )
        self.directory.joinpath("node.json").write_bytes(msgspec.json.encode(self.config))
        self.config.token_path.write_text("kin\n")
        self._server: socket.socket | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self.pids: list[int] = []
        self._nonce = 0
        self._peers: list[Peer] = []
        self.model = make_model(model)
        self.manifest, self._image = make_image(self.model)
        if model == "llama":  # whose positions are computed, so that there may be any number of them
            self.manifest = msgspec.structs.replace(
                self.manifest,
                max_context_tokens=LONG,
                config={**self.manifest.config, "max_position_embeddings": LONG},
            )
        path = self.config.checkpoints_path / DIGEST / "l1"
        path.mkdir(parents=True)
        path.joinpath("manifest.json").write_bytes(encode_manifest(self.manifest))
        self.listen()

    def listen(self) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.config.socket_path.unlink(missing_ok=True)
        self._server.bind(str(self.config.socket_path))
        self._server.listen(16)
        self._server.settimeout(TIMEOUT_S)

    def deaf(self) -> None:
        """No longer listen, as a killed agent does not."""
        assert self._server is not None
        self._server.close()

    def accept(self, role: Role, refuse: bool = False) -> tuple[Peer, Hello]:
        """The next dialler, which must be of this role; welcomed, or refused."""
        assert self._server is not None
        sock, _ = self._server.accept()
        peer = Peer(sock)
        self._peers.append(peer)
        hello = peer.next()
        assert isinstance(hello, Hello)
        assert (hello.role, hello.token) == (role, "kin")
        if refuse:
            peer.send(Refused(fault=Fault("unauthorised", "not today")))
        else:
            peer.send(Welcome(protocol=PROTOCOL, software="test", node="n", pid=os.getpid()))
        return peer, hello

    def start_zygote(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "agent", "zygote", "--run-dir", str(self.directory)])
        self._processes.append(process)
        return process

    def zygote(self) -> tuple[subprocess.Popen[bytes], Peer, ZygoteTruth]:
        process = self.start_zygote()
        peer, hello = self.accept(Role.ZYGOTE)
        assert hello.pid == process.pid
        return process, peer, peer.expect(ZygoteTruth)

    def fork(self, zygote: Peer, instance: str = "i", epoch: int = 1) -> tuple[int, Peer]:
        """A worker that has stated its empty truth; returns its pid and its connection."""
        self._nonce += 1
        zygote.send(Fork(instance=instance, epoch=Epoch(epoch), nonce=self._nonce))
        forked = zygote.expect(Forked)
        assert forked.fault is None
        assert forked.nonce == self._nonce
        self.pids.append(forked.pid)
        peer, hello = self.accept(Role.WORKER)
        assert (hello.instance, hello.epoch, hello.nonce, hello.pid) == (instance, epoch, self._nonce, forked.pid)
        truth = peer.expect(WorkerTruth)
        assert truth.truth is None
        assert peer.expect(TruthEnd).attempts == 0
        return forked.pid, peer

    def begin(self, worker: Peer, *directories: str, digest: str = DIGEST, epoch: int = 1, **options: int) -> None:
        start = StartInstance(
            instance="i",
            epoch=Epoch(1),
            model="m",
            digest=digest,
            devices=(0,),
            options=EngineOptions(kv_bytes=options.pop("kv_bytes", 1 << 26), **options),
        )
        worker.send(StartWorker(start=start, directories=directories or (f"{DIGEST}/l1",)))

    def attach(self, worker: Peer, image_bytes: int | None = None, image_id: str = "") -> None:
        self._give(worker, self._image)
        size = self.manifest.image_bytes if image_bytes is None else image_bytes
        worker.send(Attach(arena="a", extents=self._extents, image_bytes=size, image_id=image_id))

    def arrive(self, worker: Peer, memory: int, layers: int) -> None:
        """Say that the image is coming to this memory, from its beginning on, and that so many layers have come."""
        self._give(worker, memory)
        size = self.manifest.image_bytes
        worker.send(Arriving(op="o", digest=DIGEST, extents=(Extent(0, size),), image_bytes=size, layers=layers, arena="b"))

    def image(self) -> bytes:
        return b"".join(os.pread(self._image, extent.size_bytes, extent.offset_bytes) for extent in self._extents)

    @property
    def _extents(self) -> tuple[Extent, Extent]:
        return Extent(8192, 4096), Extent(16384, self.manifest.image_bytes - 4096)

    def _give(self, worker: Peer, memory: int) -> None:
        descriptor = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
        worker.send(Descriptors(what="arena-ro"), descriptors=(descriptor,))
        os.close(descriptor)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if b"agent" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        for peer in self._peers:
            peer.close()
        self.deaf()
        os.close(self._image)
        shutil.rmtree(self.directory)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_gone(pid: int) -> None:
    """Return once a process that need not be our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], TIMEOUT_S)[0], f"process {pid} did not end"
    finally:
        os.close(descriptor)


def make_image(model: Any) -> tuple[Manifest, int]:
    """A manifest, and a memfd in which the image lies in two extents after other bytes, not adjacent."""
    tensors = tensors_of(model)
    entries: list[TensorEntry] = []
    image = bytearray()
    for name, tensor in tensors.items():
        image += bytes(-len(image) % ALIGN_BYTES)
        data = tensor.numpy().tobytes()
        entries.append(TensorEntry(name, "F32", tuple(tensor.shape), 0, len(image), len(data)))
        image += data
    image += bytes(-len(image) % 4096)
    manifest = msgspec.structs.replace(
        manifest_of(model),
        digest=DIGEST,
        tensors=tuple(entries),
        partitions=(Partition("p0", 0, len(image), (0,) * -(-len(image) // (1 << 22))),),
    )
    descriptor = os.memfd_create("arena")
    os.ftruncate(descriptor, 16384 + len(image) - 4096)
    os.pwrite(descriptor, bytes(image[:4096]), 8192)
    os.pwrite(descriptor, bytes(image[4096:]), 16384)
    return manifest, descriptor


@contextlib.contextmanager
def node(agent_grace_s: float = 300.0, model: str = "llama") -> Iterator[Node]:
    made = Node(agent_grace_s, model)
    try:
        yield made
    finally:
        made.close()


__all__ = ["DIGEST", "LONG", "Heard", "Node", "Peer", "alive", "await_gone", "make_image", "node"]

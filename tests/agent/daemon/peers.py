"""The agent's peers, played in the test: a manager, a store, a zygote and workers that speak the links' protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.config import NodeConfig
from agent.daemon.agent import Agent
from agent.daemon.main import read_or_make_token
from agent.daemon.supervisor import spawn_process
from schema.checkpoint import (
    KvGeometry,
    Manifest,
    Partition,
    TensorEntry,
    TextDefaults,
    encode_manifest,
)
from schema.ids import Epoch, epoch_of
from schema.link import (
    Acked,
    AgentMessage,
    ArenaInfo,
    Attach,
    AttemptTruth,
    Cancel,
    CancelFetch,
    CancelVerify,
    ChildExited,
    Descriptors,
    DropResident,
    Ended,
    EngineOptions,
    Extent,
    FetchStored,
    FillArena,
    Fork,
    Forked,
    FrameDecoder,
    Hello,
    HoldCheckpoint,
    Ingest,
    InstanceTruth,
    InstanceUpdate,
    Message,
    NodeTruth,
    OperationDone,
    Ping,
    PinResidents,
    Pong,
    Resident,
    Role,
    SamplingParams,
    Shutdown,
    StartInstance,
    StartPhases,
    StartWorker,
    StopInstance,
    StoreTruth,
    Submit,
    TokenRun,
    Tokens,
    ToStore,
    ToWorker,
    ToZygote,
    TruthEnd,
    VerifyStored,
    Welcome,
    WorkerTruth,
    ZygoteTruth,
    encode_frame,
)
from schema.states import EndReason, InstanceState

WAIT_S = 10.0
DIGEST = "ab" * 32
T = TypeVar("T")


class Hangup(Exception):
    """The agent has closed the connection."""


class Peer:
    """A dialler of the agent's socket."""

    def __init__(self, kind: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.seen: list[Any] = []
        self.descriptors: list[int] = []
        self.ended = False
        self._decoder: FrameDecoder[Any] = FrameDecoder(kind)
        self._ready: list[Any] = []

    async def dial(self, path: Path, hello: Message | None) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    self.socket.connect(str(path))
                    break
                except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                    await asyncio.sleep(0.005)
        if hello is not None:
            self.send(hello)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self.send_raw(encode_frame(message), descriptors)

    def send_raw(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        view = memoryview(data)
        self.socket.setblocking(True)
        try:
            sent = socket.send_fds(self.socket, [view], list(descriptors))
            if sent < len(view):
                self.socket.sendall(view[sent:])
        finally:
            self.socket.setblocking(False)

    async def next(self) -> Any:
        """The next message. Raises Hangup at the end of the connection."""
        loop = asyncio.get_running_loop()
        while not self._ready:
            readable = asyncio.Event()
            loop.add_reader(self.socket, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self.socket)
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 18, 16)
            except ConnectionResetError:
                data, descriptors = b"", []
            self.descriptors.extend(descriptors)
            if not data:
                self.ended = True
                raise Hangup
            self._ready.extend(self._decoder.feed(data))
        message = self._ready.pop(0)
        self.seen.append(message)
        return message

    async def take(self, kind: type[T], where: Callable[[T], bool] = lambda _: True, timeout_s: float = WAIT_S) -> T:
        """The next message of this kind for which ``where`` holds; what comes before it is only noted in ``seen``."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.next()
                if isinstance(message, kind) and where(message):
                    return message

    async def hangup(self) -> None:
        """Wait until the agent has closed the connection."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(Hangup):
                while True:
                    await self.next()

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors.clear()


class Manager(Peer):
    """A manager's connection."""

    def __init__(self) -> None:
        super().__init__(AgentMessage)
        self.truth: NodeTruth
        self.attempts: list[AttemptTruth] = []

    async def instance(self, state: InstanceState, epoch: Epoch | None = None) -> InstanceTruth:
        update = await self.take(
            InstanceUpdate, lambda m: m.truth.state is state and (epoch is None or m.truth.epoch == epoch), 20
        )
        return update.truth

    async def instance_update(self, timeout_s: float = WAIT_S) -> InstanceTruth:
        return (await self.take(InstanceUpdate, timeout_s=timeout_s)).truth

    async def whole_truth(self) -> NodeTruth:
        self.truth = await self.take(NodeTruth)
        while not isinstance(message := await self.next(), TruthEnd):
            assert isinstance(message, AttemptTruth)
            self.attempts.append(message)
        assert message.attempts == len(self.attempts)
        return self.truth

    async def tokens_until_end(self, attempt: Epoch, *, ack: bool = True) -> tuple[list[int], Ended]:
        ids: list[int] = []
        while True:
            frame = await self.take(Tokens)
            for run in frame.runs:
                if run.attempt == attempt:
                    ids.extend(run.ids)
            ends = [end for end in frame.ends if end.attempt == attempt]
            if ack:
                self.send(Acked(frame=frame.frame, ends=tuple(end.attempt for end in ends)))
            if ends:
                return ids, ends[0]


def hello(role: Role, **fields: Any) -> Hello:
    return Hello(role=role, software="test", pid=fields.pop("pid", os.getpid()), **fields)


def submit(attempt: Epoch, start: StartInstance, **fields: Any) -> Submit:
    return Submit(
        attempt=attempt,
        instance=start.instance,
        instance_epoch=start.epoch,
        request="req_1",
        model="m",
        prompt=(1, 2, 3),
        params=SamplingParams(max_tokens=8),
        **fields,
    )


FIRST = epoch_of(1, 1)


def start_instance(instance: str = "inst_1", epoch: Epoch = FIRST, **fields: Any) -> StartInstance:
    return StartInstance(
        instance=instance,
        epoch=epoch,
        model="m",
        digest=fields.pop("digest", DIGEST),
        devices=fields.pop("devices", (0,)),
        options=EngineOptions(kv_bytes=1 << 20),
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state not in (b"Z", b"X")


def make_checkpoint(root: Path, digest: str = DIGEST) -> Path:
    """A committed checkpoint of one tensor, as ingest leaves it."""
    directory = root / digest / "l1"
    directory.mkdir(parents=True)
    (directory / "part-0").write_bytes(b"\1" * 4096)
    manifest = Manifest(
        format_version=1,
        digest=digest,
        layout="l1",
        architecture="LlamaForCausalLM",
        parameters=1024,
        vocab_size=64,
        max_context_tokens=128,
        chunk_bytes=4096,
        partitions=(Partition("part-0", 0, 4096, (0,)),),
        tensors=(TensorEntry("w", "F32", (1024,), 0, 0, 4096),),
        ties={},
        kv=KvGeometry(layers=1, kv_heads=1, head_dim=4, dtype="F32"),
        config={},
        text=TextDefaults(),
        assets=(),
    )
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
    return directory


class Store:
    """A store in one test: answers fills with one extent, keeps count of what it was told."""

    def __init__(self, node: Node, pid: int, arena: str = "arena_1") -> None:
        self.node = node
        self.pid = pid
        self.arena = arena
        self.peer = Peer(ToStore)
        self.fills: list[FillArena] = []
        self.holds: dict[str, int] = {}
        self.condemned: dict[str, str] = {}
        self.verifies: list[VerifyStored] = []
        self.cancelled: list[str] = []
        self.kept: list[str] = []
        self.fetches: list[FetchStored] = []
        self.pinned: tuple[str, ...] | None = None
        self.residents: dict[str, Resident] = {}
        self.answers = node.store_answers
        self.listens = True
        self.given: list[int] = []
        self.changed = asyncio.Condition()
        self.memory = os.memfd_create("test-arena")
        os.truncate(self.memory, 1 << 16)

    async def run(self) -> None:
        await self.peer.dial(self.node.config.socket_path, self.node.kin_hello(Role.STORE, pid=self.pid))
        welcome = await self.peer.take(Welcome)
        if welcome.descriptors:
            await self.peer.take(Descriptors)
            self.given = self.peer.descriptors
        else:
            self.peer.send(Descriptors(what="arena"), [self.memory])
        info = ArenaInfo(id=self.arena, budget_bytes=1 << 30, chunk_bytes=4 << 20)
        self.peer.send(StoreTruth(arena=info, residents=tuple(self.residents.values()), fetching=self.node.store_fetching))
        with contextlib.suppress(Hangup):
            while True:
                await self.heard(await self.peer.next())

    async def heard(self, message: Any) -> None:
        if isinstance(message, FillArena):
            self.fills.append(message)
            self.holds[message.digest] = message.users
            if self.answers:
                self.answer(message)
        elif isinstance(message, HoldCheckpoint):
            self.holds[message.digest] = message.users
            self.condemned[message.digest] = message.condemned
        elif isinstance(message, PinResidents):
            self.pinned = message.digests
        elif isinstance(message, VerifyStored):
            self.verifies.append(message)
        elif isinstance(message, FetchStored):
            self.fetches.append(message)
        elif isinstance(message, CancelVerify | CancelFetch):
            self.cancelled.append(message.op)
            self.kept += [message.op] if isinstance(message, CancelFetch) and message.keep else []
        elif isinstance(message, DropResident):
            self.residents.pop(message.digest, None)
            self.peer.send(OperationDone(op=message.op, digest=message.digest))
        elif isinstance(message, Ping) and self.listens:
            self.peer.send(Pong(nonce=message.nonce))
        elif isinstance(message, Shutdown):
            self.kill()
        async with self.changed:
            self.changed.notify_all()

    def answer(self, fill: FillArena) -> None:
        read = 0 if fill.digest in self.residents else 4096
        resident = Resident(digest=fill.digest, extents=(Extent(0, 4096),), image_bytes=4096, op=fill.op, read_bytes=read)
        self.residents[fill.digest] = resident
        self.peer.send(resident)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(true)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self.peer.close()
        os.close(self.memory)


class Zygote:
    """A zygote in one test: each fork is a sleeping process and a `Worker` that speaks for it."""

    def __init__(self, node: Node, pid: int) -> None:
        self.node = node
        self.pid = pid
        self.peer = Peer(ToZygote)
        self.forks: list[Fork] = []
        self.answers = True
        self.listens = True

    async def run(self) -> None:
        await self.peer.dial(self.node.config.socket_path, self.node.kin_hello(Role.ZYGOTE, pid=self.pid))
        await self.peer.take(Welcome)
        self.peer.send(ZygoteTruth(pids=(), threads=1))
        with contextlib.suppress(Hangup):
            while True:
                message = await self.peer.next()
                if isinstance(message, Fork):
                    self.forks.append(message)
                    if self.answers:
                        self.fork(message)
                elif isinstance(message, Ping) and self.listens:
                    self.peer.send(Pong(nonce=message.nonce))
                elif isinstance(message, Shutdown):
                    os.kill(self.pid, signal.SIGKILL)

    def fork(self, message: Fork) -> Worker:
        worker = Worker(self.node, self.node.sleeper(), message)
        self.node.workers.append(worker)
        worker.begin()
        self.peer.send(Forked(nonce=message.nonce, pid=worker.pid))
        return worker

    def exited(self, pid: int, status: int) -> None:
        self.peer.send(ChildExited(pid=pid, status=status))

    def close(self) -> None:
        self.peer.close()


class Worker:
    """A worker in one test: ready once attached; tokens come when the test says so."""

    def __init__(self, node: Node, pid: int, fork: Fork) -> None:
        self.node = node
        self.pid = pid
        self.fork = fork
        self.peer = Peer(ToWorker)
        self.start: StartInstance | None = None
        self.directories: tuple[str, ...] = ()
        self.attach: Attach | None = None
        self.memory: int | None = None
        self.becomes_ready = node.worker_becomes_ready
        self.obeys = True
        self.answers = True
        self.submits: dict[Epoch, Submit] = {}
        self.generated: dict[Epoch, list[int]] = {}
        self.ends: dict[Epoch, Ended] = {}
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.frame = 0
        self.task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self.frame = 0
        fork = self.fork
        words = self.node.kin_hello(Role.WORKER, pid=self.pid, instance=fork.instance, epoch=fork.epoch, nonce=fork.nonce)
        await self.peer.dial(self.node.config.socket_path, words)
        first = await self.peer.next()
        if not isinstance(first, Welcome):
            self.heard.put_nowait(first)
            return
        truth = self.truth(InstanceState.READY if self.attach else InstanceState.STARTING) if self.start else None
        arena = self.attach.arena if self.attach else ""
        self.peer.send(WorkerTruth(truth=truth, start=self.start, arena=arena))
        for epoch, asked in self.submits.items():
            ids = tuple(self.generated[epoch])
            self.peer.send(AttemptTruth(submit=asked, new_ids=ids, end=self.ends.get(epoch)))
        self.peer.send(TruthEnd(attempts=len(self.submits)))
        with contextlib.suppress(Hangup):
            while True:
                self._take(await self.peer.next())

    async def redial(self) -> None:
        """Hang up, if that is not done, and dial again, as after a broken link."""
        await self.hang_up()
        self.begin()

    async def hang_up(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.peer.close()
        self.peer = Peer(ToWorker)

    def begin(self) -> None:
        self.task = self.node.go(self.run())

    async def hear(self, kind: type[T]) -> T:
        async with asyncio.timeout(WAIT_S):
            while not isinstance(message := await self.heard.get(), kind):
                pass
        return message

    def truth(self, state: InstanceState) -> InstanceTruth:
        assert self.start is not None
        return InstanceTruth(
            instance=self.start.instance,
            epoch=self.start.epoch,
            digest=self.start.digest,
            state=state,
            kv_capacity_tokens=1000,
            max_context_tokens=128,
            phases=StartPhases(build_s=0.1, attach_s=0.2, warm_s=0.3),
        )

    def say(self, attempt: Epoch, ids: Sequence[int], end: EndReason | None = None) -> None:
        """Generate tokens of an attempt, and end it if asked to."""
        generated = self.generated[attempt]
        start = len(self.submits[attempt].generated) + len(generated)
        generated.extend(ids)
        ends: tuple[Ended, ...] = ()
        if end is not None:
            self.ends[attempt] = Ended(attempt=attempt, position=start + len(ids), reason=end)
            ends = (self.ends[attempt],)
        self.frame += 1
        runs = (TokenRun(attempt, start, tuple(ids)),) if ids else ()
        self.peer.send(Tokens(frame=self.frame, runs=runs, ends=ends))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _take(self, message: Any) -> None:
        match message:
            case StartWorker():
                self.start = message.start
                self.directories = message.directories
            case Descriptors():
                self.memory = self.peer.descriptors[-1]
            case Attach():
                self.attach = message
                if self.becomes_ready:
                    self.peer.send(InstanceUpdate(truth=self.truth(InstanceState.READY)))
            case Submit():
                self.submits[message.attempt] = message
                self.generated[message.attempt] = []
            case Cancel():
                if message.attempt in self.submits and message.attempt not in self.ends:
                    self.say(message.attempt, (), message.reason)
            case Acked():
                for epoch in message.ends:
                    self.submits.pop(epoch, None)
                    self.ends.pop(epoch, None)
            case StopInstance() | Shutdown():
                if self.obeys:
                    self.kill()
            case Ping():
                if self.answers:
                    self.peer.send(Pong(nonce=message.nonce))
            case _:
                pass
        self.heard.put_nowait(message)

    def close(self) -> None:
        self.peer.close()


class Node:
    """An agent in this process, whose kin are played here over real sleeping processes."""

    def __init__(self, directory: Path | None = None, **settings: Any) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
        settings = {"adopt_s": 5.0, "manager_grace_s": 60.0, "spawn_s": 20.0} | settings
        self.config = NodeConfig(run_dir=str(self.directory / "run"), data_dir=str(self.directory / "data"), **settings)
        for name in ("run", "data/checkpoints", "data/tmp", "data/log"):
            (self.directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token = read_or_make_token(self.config.token_path)
        self.stores: list[Store] = []
        self.zygotes: list[Zygote] = []
        self.workers: list[Worker] = []
        self.managers: list[Manager] = []
        self.strangers: list[Peer] = []
        self.pids: list[int] = []
        self.worker_becomes_ready = True
        self.store_answers = True
        self.store_fetching: tuple[str, ...] = ()
        self.ingest_args: list[str] = ["/bin/false"]
        self.kin_dial = True
        self.agent: Agent | None = None
        self.task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Node:
        self.begin()
        return self

    def begin(self) -> None:
        self.agent = Agent(self.config, self.token, spawn=self._spawn, ingest=self._ingest)
        self.task = asyncio.create_task(self.agent.run())

    async def __aexit__(self, *_: object) -> None:
        try:
            if self.task is not None and self.agent is not None:
                self.agent.shut_down()
                async with asyncio.timeout(30):
                    await self.task
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            peers: list[Any] = [*self.stores, *self.zygotes, *self.workers, *self.managers, *self.strangers]
            for peer in peers:
                peer.close()
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)  # noqa: ASYNC222 - it was just killed
            shutil.rmtree(self.directory, ignore_errors=True)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for what has no event to await: it is looked at on every turn of the loop."""
        async with asyncio.timeout(WAIT_S):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    def go(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        return task

    def sleeper(self) -> int:
        pid = spawn_process(["/bin/sleep", "600"], self.directory / "data" / "log" / "sleeper.log")
        self.pids.append(pid)
        return pid

    def kin_hello(self, role: Role, **fields: Any) -> Hello:
        return hello(role, token=self.token, **fields)

    def _spawn(self, config: NodeConfig, role: str) -> int:
        pid = self.sleeper()
        if self.kin_dial:
            self.play(role, pid)
        return pid

    def play(self, role: str, pid: int) -> None:
        if role == "store":
            store = Store(self, pid)
            if self.stores:
                store.residents = dict(self.stores[-1].residents)
            self.stores.append(store)
            self.go(store.run())
        else:
            self.zygotes.append(Zygote(self, pid))
            self.go(self.zygotes[-1].run())

    def _ingest(self, config: NodeConfig, message: Ingest) -> list[str]:
        return [*self.ingest_args, message.op]

    async def manager(self, generation: int = 1, cluster: str = "c1", node: str = "n1") -> Manager:
        """A manager that has the node's whole truth."""
        manager = await self.dial_manager(generation, cluster, node)
        await manager.take(Welcome)
        await manager.whole_truth()
        return manager

    async def dial_manager(self, generation: int = 1, cluster: str = "c1", node: str = "n1", **fields: Any) -> Manager:
        manager = Manager()
        self.managers.append(manager)
        words = hello(Role.MANAGER, cluster=cluster, generation=generation, node=node, **fields)
        await manager.dial(self.config.socket_path, words)
        return manager

    async def ready(self, manager: Manager, start: StartInstance | None = None) -> tuple[StartInstance, Worker]:
        """An instance that is ready, and its worker."""
        start = start or start_instance()
        manager.send(start)
        await manager.instance(InstanceState.READY, start.epoch)
        return start, self.workers[-1]

    def roster(self) -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = msgspec.json.decode((self.directory / "run" / "roster.json").read_bytes())[
            "processes"
        ]
        return processes

"""A manager to talk to: the admin API and a chat endpoint over real sockets, frozen views, and a record of what was asked."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from schema.admin import (
    CandidateView,
    CheckpointView,
    CopyView,
    DecisionView,
    EstimateErrorView,
    EstimatesView,
    EventView,
    ExplainView,
    InstanceView,
    LogFrame,
    ModelView,
    NodeVerdictView,
    NodeView,
    OperationView,
    OutcomeView,
    PlacementView,
    ProgressView,
    RequestExplainView,
    RequestTimeline,
    RequestView,
    StatusView,
    StreamFrame,
)
from schema.errors import Fault
from schema.link import ArenaInfo, DeviceInfo, EngineTiming, Inventory, StartPhases
from schema.spec import HubSource, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier, TierState

__all__ = ["NOW", "FakeManager", "fake_manager"]

NOW = 1_800_000_000.0
_DIGEST = "0123456789abcdef" * 4

_PHASES = StartPhases(
    load_s=0.41,
    loaded_from=Tier.DISK,
    loaded_bytes=1_288_490_189,
    fork_s=0.009,
    build_s=0.05,
    attach_s=0.008,
    warm_s=0.02,
    total_s=0.52,
)
NODES = (
    NodeView(
        id="node_1",
        name="local",
        address="unix:/run/sllmctl/agent.sock",
        state=NodeState.READY,
        cordoned=False,
        seen_at=NOW - 2,
        instances=1,
        inventory=Inventory(
            hostname="box",
            cpus=16,
            memory_bytes=64 << 30,
            devices=(DeviceInfo(index=0, kind="cpu", name="EPYC", memory_bytes=32 << 30),),
            arena=ArenaInfo(id="a1", budget_bytes=8 << 30, chunk_bytes=4 << 20, used_bytes=1288490189, pages="thp"),
            disk_read_bps=2.5e9,
            numerics="torch 2.9, AVX512",
        ),
    ),
    NodeView(
        id="node_2", name="gpu1", address="unix:/x", state=NodeState.UNREACHABLE, cordoned=True, seen_at=NOW - 7300, instances=0
    ),
)
MODELS = (
    ModelView(
        name="qwen",
        state=ModelState.DEPLOYED,
        digest=_DIGEST,
        spec=ModelSpec(name="qwen", source=HubSource("Qwen/Qwen3-0.6B"), scale=ScaleSpec(min=0, max=2)),
        instances={"ready": 1},
        waiting=0,
        running=3,
        fault=None,
        progress=None,
        created_at=NOW - 200_000,
    ),
    ModelView(
        name="broken",
        state=ModelState.FAILED,
        digest=None,
        spec=ModelSpec(name="broken", source=PathSource("/models/broken")),
        instances={},
        waiting=0,
        running=0,
        fault=Fault("invalid_checkpoint", "model.safetensors is cut short\x1b[31m"),
        progress=None,
        created_at=NOW - 40,
    ),
    ModelView(
        name="coming",
        state=ModelState.INGESTING,
        digest=None,
        spec=ModelSpec(name="coming", source=PathSource("/models/coming", "gpu1")),
        instances={},
        waiting=2,
        running=0,
        fault=None,
        progress=ProgressView(stage="reading", done_bytes=512 << 20, total_bytes=2 << 30, rate_bps=800e6),
        created_at=NOW - 5,
    ),
)
INSTANCES = (
    InstanceView(
        id="inst_1",
        model="qwen",
        node="local",
        digest=_DIGEST,
        state=InstanceState.READY,
        devices=(0,),
        epoch=1099511627777,
        restarts=0,
        retry_at=None,
        pid=4242,
        running=3,
        working_bytes=1 << 28,
        kv_used_tokens=120,
        kv_capacity_tokens=4096,
        activation_bytes=40 << 20,
        logits_bytes=8 << 20,
        phases=_PHASES,
        progress=None,
        fault=None,
        reason="weights are in DRAM on local",
        created_at=NOW - 190,
        changed_at=NOW - 189,
    ),
    InstanceView(
        id="inst_2",
        model="qwen",
        node="gpu1",
        digest=_DIGEST,
        state=InstanceState.BACKOFF,
        devices=(0, 1),
        epoch=1099511627778,
        restarts=2,
        retry_at=NOW + 4,
        pid=0,
        running=0,
        working_bytes=1 << 28,
        kv_used_tokens=0,
        kv_capacity_tokens=0,
        phases=None,
        progress=None,
        fault=Fault("internal", "the worker was killed by signal 9"),
        reason="the only node with two devices",
        created_at=NOW - 3700,
        changed_at=NOW - 3,
    ),
)
CHECKPOINTS = (
    CheckpointView(
        digest=_DIGEST,
        architecture="Qwen3ForCausalLM",
        image_bytes=1_288_490_189,
        kv_token_bytes=114_688,
        max_context_tokens=40960,
        models=("qwen",),
        placements=(
            PlacementView(
                node="local",
                tier=Tier.DISK,
                state=TierState.RESIDENT,
                size_bytes=1_288_490_189,
                copies=(
                    CopyView(layout="exec1", in_place=False, state=TierState.RESIDENT, verified=True, size_bytes=1_288_490_240),
                    CopyView(
                        layout="inplace1", in_place=True, state=TierState.RESIDENT, verified=False, size_bytes=1_288_490_189
                    ),
                ),
            ),
            PlacementView(node="local", tier=Tier.DRAM, state=TierState.FILLING, size_bytes=1_289_748_480),
        ),
        created_at=NOW - 200_000,
    ),
)
REQUESTS = (
    RequestView(
        id="req_1",
        model="qwen",
        state=RequestState.FINISHED,
        node="local",
        instance="inst_1",
        attempts=1,
        prompt_tokens=16,
        generated_tokens=64,
        orphaned=False,
        received_at=NOW - 65,
        timeline=RequestTimeline(
            cold=True,
            routed_s=0.53,
            first_token_s=0.61,
            ended_s=1.9,
            start=_PHASES,
            engine=EngineTiming(queued_s=0.001, prefill_s=0.021, first_token_s=0.024, total_s=1.3, steps=64),
        ),
    ),
    RequestView(
        id="req_2",
        model="qwen",
        state=RequestState.RUNNING,
        node="local",
        instance="inst_1",
        attempts=2,
        prompt_tokens=9,
        generated_tokens=3,
        orphaned=True,
        received_at=NOW - 1,
        timeline=RequestTimeline(cold=False, routed_s=0.0004),
    ),
    RequestView(
        id="req_3",
        model="qwen",
        state=RequestState.FAILED,
        instance=None,
        attempts=0,
        prompt_tokens=12,
        generated_tokens=0,
        orphaned=False,
        received_at=NOW - 700,
        timeline=RequestTimeline(cold=True, ended_s=600.0),
        fault=Fault("timed_out", "waited 600 s (cold_start_timeout_s) for an instance of model 'qwen': no instance is ready"),
    ),
)
EVENTS = (
    EventView(
        id="ev_1", at=NOW - 300, level="info", kind="model", object="qwen", reason="deployed", message="0 to 2 instances"
    ),
    EventView(
        id="ev_2", at=NOW - 3, level="warning", kind="instance", object="inst_2", reason="died", message="killed by signal 9"
    ),
)
STATUS = StatusView(
    cluster="c1",
    generation=7,
    version="0.1.0",
    pid=99,
    started_at=NOW - 1000,
    api_url="",
    ready=True,
    nodes_ready=1,
    nodes=2,
)
_HERE = CandidateView(
    node="local",
    devices=(0,),
    source="dram",
    queue_s=0.0,
    load_s=0.0,
    room_s=0.0,
    startup_s=0.12,
    delay_s=0.0,
    cost_s=0.12,
)
_THERE = CandidateView(
    node="gpu2",
    devices=(0, 1),
    source="local (peer)",
    queue_s=1.5,
    load_s=12.25,
    room_s=0.4,
    startup_s=13.8,
    delay_s=0.05,
    cost_s=13.85,
    actions=("drop idle weights of tiny/small", "move inst_7 (broken\x1b[31m) to inst_9 on gpu3"),
)
_STARTED = DecisionView(
    at=NOW - 190,
    model="qwen",
    kind="start",
    instance="inst_1",
    waiting=2,
    reason="weights are in DRAM on local",
    candidates=(_HERE, _THERE),
    rejected={"unreachable": 1, "without the checkpoint": 3},
)
_WAITED = DecisionView(
    at=NOW - 64.98,
    model="qwen",
    kind="wait",
    instance=None,
    waiting=1,
    reason="inst_1 has room in 0.4 s, sooner than gpu2 in 13.8 s",
    candidates=(_THERE,),
    rejected={},
)
EXPLAINS = {
    "qwen": ExplainView(
        model="qwen",
        at=NOW,
        decision=msgspec.structs.replace(_STARTED, at=NOW, instance=None, waiting=0),
        nodes=(
            NodeVerdictView(node="local", candidate=_HERE),
            NodeVerdictView(node="gpu2", candidate=_THERE),
            NodeVerdictView(node="gpu1", rejection="unreachable"),
            NodeVerdictView(node="gpu3", rejection="without the checkpoint"),
        ),
        last=_STARTED,
    ),
    "broken": ExplainView(
        model="broken",
        at=NOW,
        decision=DecisionView(
            at=NOW,
            model="broken",
            kind="refused",
            instance=None,
            waiting=1,
            reason="no node can hold it",
            candidates=(),
            rejected={"with a DRAM budget below the weights": 1},
        ),
        nodes=(),
        last=None,
    ),
}
REQUEST_EXPLAINS = {
    "req_1": RequestExplainView(request=REQUESTS[0], decisions=(_STARTED, _WAITED), kept=True),
    "req_2": RequestExplainView(request=REQUESTS[1], decisions=(_STARTED,), kept=True),
}
ESTIMATES = EstimatesView(
    errors=(
        EstimateErrorView(
            kind="start",
            source="disk",
            count=12,
            bias_s=0.12,
            p50_s=0.02,
            p90_s=0.4,
            p99_s=1.25,
            median_actual_s=3.5,
        ),
        EstimateErrorView(
            kind="prefill", source="", count=340, bias_s=-0.004, p50_s=0.001, p90_s=0.002, p99_s=0.009, median_actual_s=0.03
        ),
    ),
    outcomes=(OutcomeView(at=NOW - 3, kind="start", model="qwen", node="local", source="disk", estimated_s=3.4, actual_s=3.5),),
    coefficients={"disk_bps:node_1": 2.5e9, "build_s:0123456789ab": 0.31},
)
OPERATIONS = (
    OperationView(
        id="op_1",
        kind="verify",
        digest=_DIGEST,
        node="local",
        tier=Tier.DISK,
        size_bytes=1 << 30,
        began_at=NOW - 4,
        ended_at=NOW - 2,
        fault=None,
        progress=None,
        read_bytes=1 << 30,
    ),
    OperationView(
        id="op_2",
        kind="verify",
        digest=_DIGEST,
        node="gpu1",
        tier=Tier.DISK,
        size_bytes=1 << 30,
        began_at=NOW - 4,
        ended_at=NOW - 3,
        fault=Fault("invalid_checkpoint", "partition_0.bin: the 4194304 bytes at offset 0 are not what was ingested"),
        progress=None,
    ),
)
_EXPLAINS: dict[str, dict[str, Any]] = {"models": EXPLAINS, "requests": REQUEST_EXPLAINS}
_LISTS: dict[str, tuple[Any, ...]] = {
    "nodes": NODES,
    "models": MODELS,
    "instances": INSTANCES,
    "checkpoints": CHECKPOINTS,
    "operations": OPERATIONS,
    "requests": REQUESTS,
    "events": EVENTS,
}
_NAMES = {"nodes": "name", "models": "name", "instances": "id", "checkpoints": "digest", "operations": "id", "requests": "id"}


@dataclass
class FakeManager:
    """``asked`` is every request as (method, path and query, body). ``answers`` replaces what a "METHOD path" gets, in turn.

    ``pieces`` is what the chat endpoint streams; with ``hold`` it then waits until the client is gone, and sets ``gone``. So
    does what is followed.
    """

    socket: Path
    url: str
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    answers: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=lambda: ["Hel", "lo"])
    hold: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    chat_error: tuple[int, bytes] | None = None
    frames: list[StreamFrame] | list[LogFrame] = field(default_factory=list)
    """What the event stream, or a log that is followed, tells before it ends."""

    def forget(self) -> None:
        """Be as new, for the next test."""
        fresh = FakeManager(self.socket, self.url)
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(fresh, name))

    def answer(self, what: str, status: int, body: object) -> None:
        """The next answer to a "METHOD path"; the last one given is repeated."""
        self.answers.setdefault(what, []).append((status, b"" if status == 204 else msgspec.json.encode(body)))

    def refuse(self, what: str, status: int, code: str, message: str, param: str | None = None) -> None:
        self.answer(what, status, {"error": {"code": code, "message": message, "param": param}})

    async def _admin(self, request: Request) -> Response:
        path = request.url.path.removeprefix("/admin/v1/")
        body = await request.body()
        query = f"?{request.url.query}" if request.url.query else ""
        self.asked.append((request.method, path + query, json.loads(body) if body else None))
        if queue := self.answers.get(f"{request.method} {path}"):
            status, content = queue.pop(0) if len(queue) > 1 else queue[0]
            return Response(content, status, media_type="application/json")
        if path == "stream" or "follow=1" in query:
            return StreamingResponse(self._followed(), media_type="text/event-stream")
        return self._view(path)

    async def _followed(self) -> AsyncIterator[bytes]:
        try:
            for frame in self.frames:
                yield b"data: " + msgspec.json.encode(frame) + b"\n\n"
            if self.hold:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.gone.set()
            raise

    def _view(self, path: str) -> Response:
        noun, _, name = path.partition("/")
        name, _, below = name.partition("/")
        if noun == "estimates":
            return Response(msgspec.json.encode(ESTIMATES))
        if below == "explain" and name in _EXPLAINS[noun]:
            return Response(msgspec.json.encode(_EXPLAINS[noun][name]))
        if noun == "status":
            return Response(msgspec.json.encode(msgspec.structs.replace(STATUS, api_url=self.url)))
        if not name:
            return Response(msgspec.json.encode({"items": _LISTS[noun]}))
        for view in _LISTS[noun]:
            if getattr(view, _NAMES[noun]) == name:
                return Response(msgspec.json.encode(view))
        error = {"code": "not_found", "message": f"there is no {noun.removesuffix('s')} {name!r}", "param": None}
        return Response(msgspec.json.encode({"error": error}), 404)

    async def _chat(self, request: Request) -> Response:
        self.asked.append((request.method, request.url.path, await request.json()))
        if self.chat_error is not None:
            status, content = self.chat_error
            return Response(content, status, {"retry-after": "3"})
        return StreamingResponse(self._events(request), 200, {"x-request-id": "req_1"}, "text/event-stream")

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        def event(value: object) -> bytes:
            return b"data: " + msgspec.json.encode(value) + b"\n\n"

        hold = self.hold
        try:
            for piece in self.pieces:
                yield event({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": piece}}]})
            if hold:
                await asyncio.Event().wait()
            yield event({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield event({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 16, "completion_tokens": 2}})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone.set()
            raise


@contextmanager
def fake_manager() -> Iterator[FakeManager]:
    """A FakeManager that listens, in a thread of its own, until the block ends."""
    directory = tempfile.mkdtemp(dir="/tmp", prefix="sl")
    path = Path(directory) / "admin.sock"
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind(str(path))
    local.listen(16)
    tcp = socket.create_server(("127.0.0.1", 0))
    manager = FakeManager(path, f"http://127.0.0.1:{tcp.getsockname()[1]}")
    app = Starlette(
        routes=[
            Route("/admin/v1/{path:path}", manager._admin, methods=["GET", "POST", "DELETE"]),
            Route("/v1/chat/completions", manager._chat, methods=["POST"]),
        ]
    )
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, loop="asyncio", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [local, tcp]})
    thread.start()
    try:
        yield manager
    finally:
        server.should_exit = True
        thread.join(60)
        local.close()
        tcp.close()
        shutil.rmtree(directory)
        assert not thread.is_alive()

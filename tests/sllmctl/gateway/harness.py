"""The gateway on a real server and real sockets, over a router and assets that the tests drive."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvicorn
from tokenizers import Tokenizer

from schema.admin import RequestTimeline, StatusView
from schema.checkpoint import KvGeometry, Manifest, TextDefaults
from schema.errors import NotFound, SllmError
from schema.link import RetryKey, SamplingParams
from schema.spec import ModelSpec, PathSource
from schema.states import EndReason, ModelState
from sllmctl.gateway.app import api_app
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.ports import RouterPort
from sllmctl.gateway.server import server_config
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.text import TextService
from tests.checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, make_tokenizer

WAIT_S = 60.0
CONTEXT_TOKENS = 256
TOKENIZER = make_tokenizer(512)


def token_id(name: str, tokenizer: Tokenizer = TOKENIZER) -> int:
    """The id of a token that is there."""
    found = tokenizer.token_to_id(name)
    assert found is not None
    return found


END = token_id(SPECIAL_TOKENS[1])


def ids_of(text: str) -> list[int]:
    """Tokens of a text, one per byte, so that characters and stop strings lie across tokens."""
    alphabet = [TOKENIZER.encode(text_byte, add_special_tokens=False).ids for text_byte in text]
    return [token for ids in alphabet for token in ids]


class FakeSequence:
    def __init__(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs = bytearray()
        self.finish: EndReason | None = None
        self.cached_tokens: int | None = None
        self.error: SllmError | None = None
        self.waits = 0
        self.completed = asyncio.Event()
        self._changed = asyncio.Event()

    async def wait(self, position: int) -> None:
        self.waits += 1
        while len(self.tokens) <= position and self.finish is None:
            self._changed.clear()
            await self._changed.wait()
        if self.error is not None and len(self.tokens) <= position:
            raise self.error

    def emit(self, tokens: list[int], finish: EndReason | None = None, tops: int | None = None) -> None:
        """``tops``: with log-probabilities, of the token itself -0.25, of each following id a whole less."""
        self.tokens += tokens
        for token in tokens if tops is not None else ():
            self.logprobs += b"".join(struct.pack("<if", token + at - 1, 0.75 - at) for at in (1, *range(1, (tops or 0) + 1)))
        self.finish = finish
        self._changed.set()

    def complete(self) -> None:
        self.finish = self.finish or EndReason.STOP
        self.completed.set()

    def fail(self, error: SllmError) -> None:
        self.error = error
        self.finish = EndReason.ERROR
        self._changed.set()


class FakeRequest:
    def __init__(
        self, name: str, model: str, prompt: tuple[int, ...], params: SamplingParams, choices: int, tenant: str
    ) -> None:
        self.tenant = tenant
        self.id = name
        self.model = model
        self.params = params
        self.received_at = time.time()
        self.sequences = [FakeSequence(prompt) for _ in range(choices)]
        self.cancelled = asyncio.Event()
        self.left_with: SllmError | None = None

    @property
    def sequence(self) -> FakeSequence:
        return self.sequences[0]

    @property
    def prompt_text(self) -> str:
        return TOKENIZER.decode(list(self.sequence.prompt), skip_special_tokens=False)

    def say(self, text: str, finish: EndReason | None = None) -> None:
        self.sequence.emit(ids_of(text), finish)

    def timeline(self) -> RequestTimeline:
        return RequestTimeline(cold=False, routed_s=0.001, first_token_s=0.01, ended_s=0.02)

    def leave(self, error: SllmError | None = None) -> None:
        self.left_with = error
        if any(sequence.finish is None for sequence in self.sequences):
            self.cancelled.set()


@dataclass
class FakeModel:
    spec: ModelSpec
    state: ModelState = ModelState.DEPLOYED
    digest: str | None = "d" * 64
    max_context_tokens: int = CONTEXT_TOKENS


def model_named(name: str, **values: object) -> FakeModel:
    return FakeModel(ModelSpec(name=name, source=PathSource("/models/x")), **values)  # type: ignore[arg-type]


class FakeRouter:
    """Requests come out of `taken` in order; ``reply`` answers each at once where it is set; ``refuse`` refuses each."""

    def __init__(self) -> None:
        self.routed = {"tiny": model_named("tiny"), "asleep": model_named("asleep", state=ModelState.STOPPED)}
        self.reply: Callable[[FakeRequest], None] | None = None
        self.refuse: SllmError | None = None
        self.requests: list[FakeRequest] = []
        self._taken: asyncio.Queue[FakeRequest] = asyncio.Queue()

    def model(self, name: str) -> FakeModel:
        if name not in self.routed:
            raise NotFound(f"no model {name}")
        return self.routed[name]

    def models(self) -> list[FakeModel]:
        return list(self.routed.values())

    def join(self, retry: RetryKey) -> FakeRequest | None:
        return None

    def submit(
        self,
        model: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        choices: int = 1,
        tenant: str = "",
        retry: RetryKey | None = None,
        request_id: str = "",
    ) -> FakeRequest:
        if self.refuse is not None:
            raise self.refuse
        request = FakeRequest(request_id or f"req_{len(self.requests):026}", model, prompt, params, choices, tenant)
        self.requests.append(request)
        if self.reply is not None:
            self.reply(request)
        self._taken.put_nowait(request)
        return request

    async def taken(self) -> FakeRequest:
        return await asyncio.wait_for(self._taken.get(), WAIT_S)


@dataclass
class FakeAssets:
    manifest: Manifest
    directory: Path
    error: SllmError | None = None
    asked: int = 0

    async def get(self, digest: str, timeout_s: float) -> FakeAssets:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self


def make_manifest(text: TextDefaults, digest: str = "d" * 64) -> Manifest:
    return Manifest(
        format_version=1,
        digest=digest,
        layout="l1",
        architecture="LlamaForCausalLM",
        parameters=0,
        vocab_size=TOKENIZER.get_vocab_size(),
        max_context_tokens=CONTEXT_TOKENS,
        chunk_bytes=4096,
        partitions=(),
        tensors=(),
        ties={},
        kv=KvGeometry(1, 1, 1, "F32"),
        config={},
        text=text,
        assets=(),
    )


@contextlib.contextmanager
def assets_directory(template: str = CHAT_TEMPLATE, text: TextDefaults | None = None) -> Iterator[FakeAssets]:
    text = text or TextDefaults(
        stop_token_ids=(END,),
        has_template=True,
        special_tokens={"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]},
    )
    with tempfile.TemporaryDirectory(prefix="sl") as directory:
        path = Path(directory)
        TOKENIZER.save(str(path / "tokenizer.json"))
        (path / "chat_template.jinja").write_text(template)
        yield FakeAssets(make_manifest(text), path)


@dataclass
class Serving:
    """A running gateway; ``url`` is where. ``stop`` has its server begin to end."""

    router: FakeRouter
    assets: FakeAssets
    metrics: Metrics
    port: int
    ready: bool = True
    client: httpx.AsyncClient = field(init=False)
    stop: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.AsyncClient(base_url=self.url, timeout=WAIT_S, verify=False)

    def status(self) -> StatusView:
        return StatusView(
            cluster="c",
            generation=1,
            version="0",
            pid=1,
            started_at=0.0,
            api_url=self.url,
            ready=self.ready,
            nodes_ready=int(self.ready),
            nodes=1,
        )

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.value(name, labels)


def http_post(path: str, body: object, *headers: str) -> bytes:
    """The bytes of a POST request."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    if not any(header.lower().startswith("content-length") for header in headers):
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def chat_body(content: str = "hi", **more: Any) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}


@contextlib.asynccontextmanager
async def serving(
    settings: GatewaySettings | None = None,
    *,
    template: str = CHAT_TEMPLATE,
    text: TextDefaults | None = None,
    router: RouterPort | None = None,
    hosts: tuple[str, ...] | None = None,
) -> AsyncIterator[Serving]:
    """A gateway over ``router``, or over a fake one that the test finds in what it is given."""
    settings = settings or GatewaySettings(drain_s=1.0)
    listener = socket.create_server(("127.0.0.1", 0))
    metrics = Metrics()
    with assets_directory(template, text) as assets:
        here = Serving(FakeRouter(), assets, metrics, listener.getsockname()[1])
        app = api_app(
            router=router or here.router,
            assets=assets,
            text=TextService(settings),
            settings=settings,
            status=here.status,
            metrics=metrics,
            hosts=hosts,
        )
        server = uvicorn.Server(server_config(app, settings, metrics))
        # Signals are the test runner's.
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        here.stop = functools.partial(setattr, server, "should_exit", True)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(WAIT_S):
                while not (await here.client.get("/healthz")).is_success:
                    raise AssertionError("the server answers, but not that it is well")
            yield here
        finally:
            await here.client.aclose()
            here.stop()
            await asyncio.wait_for(task, WAIT_S)

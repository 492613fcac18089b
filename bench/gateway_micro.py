"""What the gateway alone costs, without nodes: processor time per streamed token and per short request; a template's rendering.

The server is a process of its own with uvicorn, uvloop and real sockets; its router makes a token for every stream at each
turn of the event loop. The floor is a bare application on the same server that sends a prepared event per turn.

    python -m bench.gateway_micro [--streams 64] [--tokens 500] [--requests 3000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from schema.errors import SllmError
from schema.link import RetryKey, SamplingParams
from schema.states import EndReason
from sllmctl.gateway.app import api_app
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.server import server_config
from sllmctl.gateway.settings import GatewaySettings
from sllmctl.gateway.template import TemplateRenderer
from sllmctl.gateway.text import TextService
from tests.checkpoints import CHAT_TEMPLATE
from tests.sllmctl.gateway.harness import FakeRequest, FakeRouter, Serving, assets_directory, chat_body, http_post, ids_of

_EVENT = b'data: {"id":"chatcmpl-0","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'


class TurnRouter(FakeRouter):
    """Every running request gets a token per turn of the event loop; one asked for two tokens gets them at once."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[FakeRequest] = []
        self._turns: asyncio.Task[None] | None = None
        self.turn = asyncio.Event()
        self.bare = 0

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
        request = FakeRequest(request_id or f"req_{len(self.requests):026}", model, prompt, params, choices, tenant)
        if params.max_tokens <= 2:
            request.sequence.emit(_TOKENS[: params.max_tokens], EndReason.LENGTH)
        else:
            self._running.append(request)
            self.start()
        return request

    def start(self) -> None:
        if self._turns is None or self._turns.done():
            self._turns = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._running or self.bare:
            for request in list(self._running):
                sequence = request.sequence
                last = len(sequence.tokens) + 1 >= request.params.max_tokens
                sequence.emit(_TOKENS[:1], EndReason.LENGTH if last else None)
                if last:
                    self._running.remove(request)
            turn, self.turn = self.turn, asyncio.Event()
            turn.set()
            await asyncio.sleep(0)


_TOKENS = ids_of("to")


async def _serve() -> None:
    router = TurnRouter()
    settings = GatewaySettings(drain_s=1.0)
    with assets_directory() as assets:
        router.routed["tiny"].max_context_tokens = 1 << 20
        here = Serving(router, assets, Metrics(), 0)
        api = api_app(router=router, assets=assets, text=TextService(settings), settings=settings, status=here.status)

        async def bare(tokens: int, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            router.bare += 1
            router.start()
            for _ in range(tokens):
                await router.turn.wait()
                await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
            router.bare -= 1
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/bare/"):
                await bare(int(scope["path"].rpartition("/")[2]), send)
            else:
                await api(scope, receive, send)

        server = uvicorn.Server(server_config(app, settings))
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        await server.serve(sockets=[listener])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _stream(port: int, request: bytes, mark: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    count, tail = 0, b""
    while b"[DONE]" not in tail:
        data = await reader.read(1 << 18)
        if not data:
            raise SllmError("the server closed a stream")
        count += data.count(mark)
        tail = data[-64:]
    writer.close()
    return count


async def _short(port: int, request: bytes, times: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(times):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
    writer.close()


async def _measure(pid: int, port: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """(processor ms, wall ms) per token or request, by what was measured."""
    short = chat_body(max_tokens=2)
    loads: dict[str, tuple[bytes, bytes]] = {
        "bare stream": (f"GET /bare/{args.tokens} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), b'"content"'),
        "chat stream": (
            http_post("/v1/chat/completions", chat_body(max_tokens=args.tokens, stream=True)),
            b'"delta":{"content"',
        ),
    }
    results = {}
    for name, (request, mark) in loads.items():
        cpu, wall = _cpu_s(pid), time.perf_counter()
        counts = await asyncio.gather(*(_stream(port, request, mark) for _ in range(args.streams)))
        cpu, wall = _cpu_s(pid) - cpu, time.perf_counter() - wall
        assert sum(counts) > 0.95 * args.streams * args.tokens, "tokens came together, so this is no cost per token"
        results[name] = (1000 * cpu / sum(counts), 1000 * wall / sum(counts))
    completion = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    for name, request in (
        ("short chat", http_post("/v1/chat/completions", short)),
        ("short completion", http_post("/v1/completions", completion)),
    ):
        cpu, wall = _cpu_s(pid), time.perf_counter()
        await asyncio.gather(*(_short(port, request, args.requests // 16) for _ in range(16)))
        cpu, wall = _cpu_s(pid) - cpu, time.perf_counter() - wall
        count = args.requests // 16 * 16
        results[name] = (1000 * cpu / count, 1000 * wall / count)
    return results


async def _render_ms(times: int) -> float:
    """Median wall time of a chat template's rendering in the warm helper, one after another."""
    renderer = TemplateRenderer(GatewaySettings())
    variables = {"messages": chat_body("Where is the store?")["messages"], "bos_token": "<s>", "add_generation_prompt": True}
    await renderer.start()
    spans = []
    for _ in range(times):
        began = time.perf_counter()
        await renderer.render(CHAT_TEMPLATE, variables)
        spans.append(time.perf_counter() - began)
    await renderer.close()
    return 1000 * statistics.median(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve())
        return
    server = subprocess.Popen([sys.executable, "-m", "bench.gateway_micro", "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        rounds = []
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_measure(server.pid, port, argparse.Namespace(streams=4, tokens=50, requests=160)))
            rounds = [runner.run(_measure(server.pid, port, args)) for _ in range(args.rounds)]
            render_ms = runner.run(_render_ms(1000))
    finally:
        server.terminate()
        server.wait(10)
    print(f"medians of {args.rounds} rounds; {args.streams} streams of {args.tokens} tokens")
    print(f"{args.requests} short requests over 16 connections")
    for name in rounds[0]:
        cpu, wall = (statistics.median(each[name][at] for each in rounds) for at in (0, 1))
        rate = f"   {1000 / cpu:.0f}/s of one core" if name.startswith("short") else ""
        print(f"{name:18} {cpu:.4f} ms processor, {wall:.4f} ms wall each{rate}")
    print(f"{'template':18} {render_ms:.4f} ms wall each")


if __name__ == "__main__":
    main()

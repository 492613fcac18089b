"""What the whole path from socket to engine and back adds to the engine's own times, and how many short requests it takes.

At 1 and 64 concurrent streams, per request: (time to first token at the client) - (first token as the engine counts it),
and per token: (the client's time from first to last token - the engine's) / tokens. A bare uvicorn stream of prepared events is
measured in the same run, as the floor. The client is a process of its own.

    python -m bench.gateway [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.report import Report
from tests.cluster import Cluster

TOKENS = 100
SHORT_REQUESTS = 1500


def http_head(length: int) -> str:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


async def stream_once(host: str, port: int, body: dict[str, Any]) -> tuple[float, float, int, str]:
    """(seconds to the first token, seconds to the last, pieces, request id); over a bare socket, so that it costs little."""
    payload = json.dumps(body).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    head = http_head(len(payload))
    writer.write(head.encode() + payload)
    headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    assert " 200 " in headers.splitlines()[0], headers
    request_id = next((line.split(": ")[1] for line in headers.splitlines() if line.startswith("x-request-id")), "")
    first = last = 0.0
    pieces = 0
    tail = b""
    while data := await reader.read(1 << 16):
        now = time.monotonic()
        count = data.count(b'"text":"') + data.count(b'"text": "')
        if count and not first:
            first = now
        if count:
            last = now
        pieces += count
        tail = (tail + data)[-64:]
        if b"[DONE]" in tail:
            break
    writer.close()
    return first - began, last - began, pieces, request_id


async def streams(host: str, port: int, concurrency: int, rounds: int) -> list[tuple[float, float, int, str]]:
    body = {
        "model": "docs", "prompt": "sllmctl is a", "max_tokens": TOKENS, "temperature": 1, "seed": 1, "stream": True,
    }  # fmt: skip
    results = []
    for _ in range(rounds):
        results += await asyncio.gather(*(stream_once(host, port, body | {"seed": i}) for i in range(concurrency)))
    return results


async def shorts(host: str, port: int, connections: int) -> float:
    """Short non-streamed requests a second, over kept-alive connections."""
    body = json.dumps({"model": "docs", "prompt": "tier", "max_tokens": 1, "temperature": 0}).encode()
    head = http_head(len(body))
    remaining = SHORT_REQUESTS

    async def one() -> None:
        nonlocal remaining
        reader, writer = await asyncio.open_connection(host, port)
        while remaining > 0:
            remaining -= 1
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in answer.split(b"\r\n")[0], answer
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(connections)))
    return SHORT_REQUESTS / (time.monotonic() - began)


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """The result of an async function run in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (function, args))


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return asyncio.run(function(*args))


def bare_server(port_out: Any) -> None:
    """The floor: uvicorn sending prepared events as fast as the socket takes them, one write a token."""
    import uvicorn

    from sllmctl.listeners import bind_tcp

    event = b'data: {"id":"cmpl-0","object":"text_completion","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(TOKENS):
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    sock = bind_tcp("127.0.0.1", 0)
    port_out.send(sock.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", access_log=False))
    asyncio.run(server.serve(sockets=[sock]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report("gateway: what is added to the engine's own times; short requests a second")
    floor(report, args.rounds)
    with Cluster() as cluster:
        cluster.add_model(scale={"min": 1, "max": 1, "max_concurrency": 128})
        cluster.ready_instance()
        url = httpx.URL(cluster.url)
        for concurrency in (1, 64):
            in_child(streams, url.host, url.port, concurrency, 1)
            results = in_child(streams, url.host, url.port, concurrency, args.rounds if concurrency > 1 else args.rounds * 8)
            added(report, cluster, concurrency, results)
        for connections in (1, 32):
            rates = [in_child(shorts, url.host, url.port, connections) for _ in range(args.rounds)]
            report.row(f"short requests, {connections} connections", rates, "1/s", ">= 300" if connections > 1 else "")
    if args.json:
        report.save(args.json)


def floor(report: Report, rounds: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=bare_server, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    for concurrency in (1, 64):
        began = time.monotonic()
        results = in_child(streams, "127.0.0.1", port, concurrency, rounds)
        del began
        per_token = [(last - first) / (pieces - 1) * 1e3 / concurrency for first, last, pieces, _ in results]
        report.row(f"bare uvicorn, {concurrency} streams: time per token", per_token, "ms")
    server.terminate()
    server.join()


def added(report: Report, cluster: Cluster, concurrency: int, results: list[tuple[float, float, int, str]]) -> None:
    first_added, token_added = [], []
    for first, last, _, request_id in results:
        engine = cluster.get(f"/requests/{request_id}")["timeline"]["engine"]
        first_added.append((first - engine["first_token_s"]) * 1e3)
        token_added.append(((last - first) - (engine["total_s"] - engine["first_token_s"])) / (TOKENS - 1) * 1e3)
    report.row(f"{concurrency} streams: added to the time to first token", first_added, "ms", "< 5")
    report.row(f"{concurrency} streams: added per token", token_added, "ms", "< 0.1")


if __name__ == "__main__":
    main()

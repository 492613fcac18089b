"""What the whole path from socket to engine and back adds to the engine's own times, and how many short requests it takes.

The same clients twice, 1 and 64 of them, each with one stream after another and a random pause before each: once over HTTP, and
once as calls into an engine that stands alone in a process, the time of a step that is under way when a client comes counted in
both. Added are the differences: of the medians of the time to first token, and of the time per token. A bare uvicorn that
streams prepared events is measured too, as the floor of HTTP itself. The HTTP client is a process of its own; on a machine
with two cores it, the manager, the agent and the worker share them, where the engine alone has one to itself.

    python -m bench.gateway [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.report import Report
from schema.ids import Epoch
from schema.link import EngineOptions, SamplingParams, Submit
from tests.cluster import Cluster

TOKENS = 100
KV_BYTES = 128 << 20
SHORT_REQUESTS = 1500
PAUSE_S = 0.2
PROMPT = "sllmctl is a"


def http_head(length: int) -> bytes:
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    return head.encode()


async def stream_once(host: str, port: int, body: dict[str, Any]) -> tuple[float, float, int]:
    """(seconds to the first token, seconds to the last, tokens); over a bare socket, so that it costs little."""
    payload = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(http_head(len(payload)) + payload)
    headers = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in headers.split(b"\r\n")[0], headers
    first = last = 0.0
    tail = b""
    while data := await reader.read(1 << 16):
        now = time.monotonic()
        if b'"text":' in data:
            first = first or now
            last = now
        tail = (tail + data)[-512:]
        if b"[DONE]" in tail:
            break
    writer.close()
    usage = tail.rpartition(b'"completion_tokens":')[2]
    tokens = int(usage.split(b",")[0].split(b"}")[0]) if usage[:1].isdigit() else TOKENS
    return first - began, last - began, tokens


def pauses(client: int) -> Iterator[float]:
    """Seconds before each stream of a client; the same in both runs."""
    source = random.Random(client)
    while True:
        yield source.expovariate(1 / PAUSE_S)


async def streams(host: str, port: int, concurrency: int, each: int) -> list[tuple[float, float]]:
    """(time to first token, time per token after it) of each stream, in seconds; each client's first is not counted."""
    # All that the engine alone is given, so that the model's own defaults do not make the work another.
    body = {"model": "docs", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1, "top_p": 1, "stream": True}
    results = []

    async def one(client: int) -> None:
        for turn, pause in zip(range(each + 1), pauses(client), strict=False):
            await asyncio.sleep(pause)
            first, last, tokens = await stream_once(host, port, body | {"seed": client * 1000 + turn})
            if turn and tokens > 1:
                results.append((first, (last - first) / (tokens - 1)))

    await asyncio.gather(*(one(client) for client in range(concurrency)))
    return results


def engine_alone(checkpoints: str, concurrency: int, each: int) -> list[tuple[float, float]]:
    """The same of an engine in this process, which takes new requests between two steps, as a worker's does."""
    import torch
    from tokenizers import Tokenizer

    from agent.engine.build import build_engine
    from agent.engine.image import image_tensors
    from agent.store.catalog import partition_path, scan
    from agent.store.index import read_index

    torch.set_num_threads(1)
    (entry,) = scan(Path(checkpoints)).values()
    image = bytearray(b"".join(partition_path(entry.directory, part).read_bytes() for part in entry.manifest.partitions))
    options = EngineOptions(kv_bytes=KV_BYTES, max_concurrency=128)
    engine = build_engine(
        entry.manifest, image_tensors(read_index(entry.directory, entry.manifest), memoryview(image)), options
    )
    prompt = tuple(Tokenizer.from_file(str(entry.directory / "tokenizer.json")).encode(PROMPT).ids)
    waiting = {client: pauses(client) for client in range(concurrency)}
    due = [(time.monotonic() + next(gaps), client, 0) for client, gaps in waiting.items()]
    heapq.heapify(due)
    begun: dict[int, tuple[float, int, int]] = {}
    firsts: dict[int, float] = {}
    results = []
    while due or begun:
        now = time.monotonic()
        while due and due[0][0] <= now:
            at, client, turn = heapq.heappop(due)
            attempt = len(firsts) + len(begun) + 1 + client * 1_000_000 + turn * 1000
            begun[attempt] = (at, client, turn)
            params = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=client * 1000 + turn, stop_token_ids=(0,))
            engine.submit(
                Submit(
                    attempt=Epoch(attempt),
                    instance="i",
                    instance_epoch=Epoch(1),
                    request="r",
                    model="m",
                    prompt=prompt,
                    params=params,
                )
            )
        if not begun:
            time.sleep(max(0.0, due[0][0] - time.monotonic()))
            continue
        output = engine.step()
        now = time.monotonic()
        for run in output.runs:
            firsts.setdefault(run.attempt, now)
        for end in output.ends:
            at, client, turn = begun.pop(end.attempt)
            first = firsts.pop(end.attempt)
            if turn and end.position > 1:
                results.append((first - at, (now - first) / (end.position - 1)))
            if turn < each:
                heapq.heappush(due, (now + next(waiting[client]), client, turn + 1))
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
            writer.write(head + body)
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
    result = function(*args)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


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
    with Cluster(settings="threads = 1\n") as cluster:
        cluster.add_model(scale={"min": 1, "max": 1, "max_concurrency": 128}, engine={"kv_bytes": KV_BYTES})
        cluster.ready_instance()
        checkpoints = str(cluster.directory / "data" / "checkpoints")
        url = httpx.URL(cluster.url)
        for concurrency in (1, 64):
            each = 4 if concurrency > 1 else 24
            alone, http, spent = [], [], []
            for _ in range(args.rounds):
                alone.append(in_child(engine_alone, checkpoints, concurrency, each))
                before = cpu_seconds(cluster)
                http.append(in_child(streams, url.host, url.port, concurrency, each))
                tokens = concurrency * (each + 1) * TOKENS
                after = cpu_seconds(cluster)
                spent.append({role: (after[role] - before[role]) / tokens * 1e3 for role in after})
            added(report, concurrency, alone, http)
            for role in ("manager", "agent"):
                values = [figures[role] for figures in spent]
                report.row(f"{concurrency} streams: processor time per token, {role}", values, "ms", "< 0.1")
        for connections in (1, 32):
            rates = [in_child(shorts, url.host, url.port, connections) for _ in range(args.rounds)]
            report.row(f"short requests, {connections} connections", rates, "1/s", ">= 300" if connections > 1 else "")
    if args.json:
        report.save(args.json)


def cpu_seconds(cluster: Cluster) -> dict[str, float]:
    """Processor time used so far by the manager and its node's processes, by role."""
    assert cluster.manager is not None
    used = {}
    for role, pid in {"manager": cluster.manager.pid, **cluster.roster()}.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used[role] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def floor(report: Report, rounds: int) -> None:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=bare_server, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    for concurrency in (1, 64):
        rates = []
        for _ in range(rounds):
            results = in_child(streams, "127.0.0.1", port, concurrency, 4)
            rates.append(statistics.median(per_token for _, per_token in results) * 1e3)
        report.row(f"bare uvicorn, {concurrency} streams: time per token", rates, "ms")
    server.terminate()
    server.join()


def added(
    report: Report, concurrency: int, alone: list[list[tuple[float, float]]], http: list[list[tuple[float, float]]]
) -> None:
    """One figure per round: the difference of the two runs' medians."""

    def medians(runs: list[list[tuple[float, float]]], index: int) -> list[float]:
        return [statistics.median(result[index] for result in run) * 1e3 for run in runs]

    for index, what, aim in ((0, "time to first token", "< 5"), (1, "time per token", "< 0.1")):
        own, whole = medians(alone, index), medians(http, index)
        report.row(f"{concurrency} streams: {what}, engine alone", own, "ms")
        report.row(f"{concurrency} streams: {what}, over HTTP", whole, "ms")
        report.row(f"{concurrency} streams: {what}, added", [b - a for a, b in zip(own, whole, strict=True)], "ms", aim)


if __name__ == "__main__":
    main()

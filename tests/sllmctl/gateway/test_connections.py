"""Clients that go away, stop reading, or send what is no request: over raw sockets, on the event loop of production."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import msgspec
import pytest
import uvloop

from schema.errors import TimedOut
from schema.states import EndReason
from sllmctl.gateway.settings import GatewaySettings
from tests.sllmctl.gateway.harness import WAIT_S, FakeRequest, Serving, chat_body, http_post, ids_of, serving

_CHAT = "/v1/chat/completions"


P = ParamSpec("P")


def on_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test on the event loop of production."""

    @functools.wraps(test)
    def run(*args: P.args, **values: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **values))

    return run


async def _status(reader: asyncio.StreamReader) -> int:
    line = await asyncio.wait_for(reader.readline(), WAIT_S)
    return int(line.split(b" ")[1]) if line else 0


async def _whole(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    body = await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), WAIT_S)
    return int(head[0].split()[1]), headers, body


async def _until(here: Serving, **labels: str) -> None:
    """Until a request was counted as ended so; the count is the last thing that is done for it."""
    async with asyncio.timeout(WAIT_S):
        while not here.metric("sllm_requests_total", **labels):
            await here.client.get("/healthz")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("abortive", [False, True])
@on_uvloop
async def test_a_client_that_goes_away_cancels_its_request(stream: bool, started: bool, abortive: bool) -> None:
    async with serving() as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(stream=stream)))
        request = await here.router.taken()
        if started:
            request.say("some text")
            if stream:
                await asyncio.wait_for(reader.readuntil(b"some text"), WAIT_S)
        assert not request.cancelled.is_set()
        if abortive:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await asyncio.wait_for(request.cancelled.wait(), WAIT_S)
        assert request.left_with is None
        await _until(here, model="tiny", status="499")
        assert here.metric("sllm_live_requests") == 0
        assert here.metric("sllm_live_streams") == 0


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_client_that_goes_away_cancels_its_request_though_it_has_sent_another(stream: bool) -> None:
    async with serving() as here:
        _, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(stream=stream)) * 2)
        request = await here.router.taken()
        writer.close()
        await asyncio.wait_for(request.cancelled.wait(), WAIT_S)
        await _until(here, model="tiny", status="499")
        assert len(here.router.requests) == 1


@on_uvloop
async def test_a_client_that_goes_away_before_its_body_is_there() -> None:
    async with serving() as here:
        _, writer = await here.raw()
        writer.write(http_post(_CHAT, b'{"model": ', "Content-Length: 1000"))
        await writer.drain()
        writer.close()
        await _until(here, model="", status="499")
        assert not here.router.requests


@on_uvloop
async def test_other_streams_go_on_when_one_client_goes() -> None:
    async with serving() as here:
        pairs = [await here.raw() for _ in range(2)]
        for _, writer in pairs:
            writer.write(http_post(_CHAT, chat_body(stream=True)))
        first, second = await here.router.taken(), await here.router.taken()
        pairs[0][1].close()
        await asyncio.wait_for(first.cancelled.wait(), WAIT_S)
        second.say("still here", EndReason.LENGTH)
        data = await asyncio.wait_for(pairs[1][0].readuntil(b"[DONE]"), WAIT_S)
        assert b"still here" in data
        assert not second.cancelled.is_set()
        pairs[1][1].close()


@on_uvloop
async def test_a_reader_that_stops_reading_is_dropped() -> None:
    async with serving(GatewaySettings(slow_reader_timeout_s=0.3, drain_s=1.0)) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", here.port))
        await loop.sock_sendall(slow, http_post(_CHAT, chat_body(stream=True)))
        request = await here.router.taken()

        tokens = ids_of("x" * 4000)

        async def talk() -> None:
            while not request.cancelled.is_set():
                request.sequence.emit(tokens)
                await asyncio.sleep(0)

        await asyncio.wait_for(talk(), WAIT_S)
        await _until(here, model="tiny", status="499")
        assert here.metric("sllm_connections_dropped_total", reason="slow reader") == 1
        assert here.metric("sllm_request_errors_total", code="timed_out") == 1
        assert isinstance(request.left_with, TimedOut), "it did not go by itself"
        assert "slow reader" in request.left_with.message

        async def rest() -> bytes:
            data = b""
            while chunk := await loop.sock_recv(slow, 1 << 20):
                data += chunk
            return data

        assert not (await asyncio.wait_for(rest(), WAIT_S)).endswith(b"0\r\n\r\n"), "what was unsent is thrown away"
        slow.close()


@on_uvloop
async def test_a_slow_reader_that_reads_in_time_gets_everything() -> None:
    async with serving(GatewaySettings(slow_reader_timeout_s=60, drain_s=1.0)) as here:
        here.router.reply = lambda request: request.sequence.emit(ids_of("y") * 2_000_000, EndReason.LENGTH)
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(stream=True)))
        data = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
        assert data.startswith(b"HTTP/1.1 200")
        total = 0
        while b"[DONE]" not in (chunk := await asyncio.wait_for(reader.read(1 << 16), WAIT_S)):
            assert chunk
            total += len(chunk)
        assert total > 1_900_000
        writer.close()


@on_uvloop
async def test_bodies_that_are_no_json_or_no_object() -> None:
    bodies = [
        b"",
        b"{",
        b'{"model": "tiny",}',
        b"[]",
        b'"x"',
        b"null",
        b'{"model": "\xff"}',
        b"\x00",
        b"[" * 100_000,
        b'{"a":' * 5000,
    ]
    async with serving() as here:
        reader, writer = await here.raw()
        for body in bodies:
            writer.write(http_post(_CHAT, body))
            status, headers, answer = await _whole(reader)
            error = msgspec.json.decode(answer)["error"]
            assert (status, error["type"], headers["content-type"]) == (400, "invalid_request_error", "application/json"), body[
                :20
            ]
        here.router.reply = lambda request: request.say("fine", EndReason.LENGTH)
        writer.write(http_post(_CHAT, chat_body()))
        assert (await _whole(reader))[0] == 200, "the connection is still good"
        writer.close()


@pytest.mark.parametrize("apart", [False, True])
@on_uvloop
async def test_an_offer_of_another_protocol_is_passed_over(apart: bool) -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say(request.prompt_text, EndReason.LENGTH)
        reader, writer = await here.raw()
        offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
        for text in ("one", "two"):
            head, end, body = http_post(_CHAT, chat_body(text), *offer).partition(b"\r\n\r\n")
            writer.write(head + end)
            if apart:
                await writer.drain()
                await here.client.get("/healthz")
            writer.write(body)
            status, _, answer = await _whole(reader)
            assert status == 200
            assert text in json.loads(answer)["choices"][0]["message"]["content"]
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" * 1000)
        for _ in range(1000):
            assert (await _whole(reader))[0] == 200
        writer.close()


@on_uvloop
async def test_bytes_that_are_no_http() -> None:
    async with serving() as here:
        chunked = http_post(_CHAT, b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"") + b"zzz\r\n"
        for garbage in (b"\x16\x03\x01 hello\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", chunked):
            reader, writer = await here.raw()
            writer.write(garbage)
            status, headers, answer = await _whole(reader)
            assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
            assert msgspec.json.decode(answer)["error"]["type"] == "invalid_request_error"
            assert await reader.read() == b""
            writer.close()
        assert (await here.client.get("/healthz")).status_code == 200


@on_uvloop
async def test_garbage_behind_a_running_response_is_no_part_of_it() -> None:
    async with serving() as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(stream=True)))
        request = await here.router.taken()
        request.say("some text")
        got = await asyncio.wait_for(reader.readuntil(b"some text"), WAIT_S)
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            got += await asyncio.wait_for(reader.read(), WAIT_S)
        assert got.count(b"HTTP/1.1") == 1
        await asyncio.wait_for(request.cancelled.wait(), WAIT_S)
        writer.close()


@pytest.mark.parametrize("announced", [True, False])
@on_uvloop
async def test_a_body_over_the_limit(announced: bool) -> None:
    async with serving(GatewaySettings(body_limit_bytes=10_000, drain_s=1.0)) as here:
        reader, writer = await here.raw()
        body = msgspec.json.encode(chat_body("x" * 20_000))
        if announced:
            writer.write(http_post(_CHAT, body))
        else:
            head = http_post(_CHAT, b"", "Transfer-Encoding: chunked", "Content-Length-Not: 1").replace(
                b"Content-Length: 0\r\n", b""
            )
            writer.write(head)
            for start in range(0, len(body), 1000):
                part = body[start : start + 1000]
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
            writer.write(b"0\r\n\r\n")
        status, _, answer = await _whole(reader)
        assert status == 413
        assert msgspec.json.decode(answer)["error"]["code"] == "body_too_large"
        assert not here.router.requests
        here.router.reply = lambda request: request.say("fine", EndReason.LENGTH)
        writer.write(http_post(_CHAT, chat_body()))
        assert (await _whole(reader))[0] == 200, "it was read to its end, so the connection is still good"
        writer.close()


@on_uvloop
async def test_a_body_that_claims_gigabytes_is_refused_unread() -> None:
    async with serving() as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, b"", f"Content-Length: {1 << 40}"))
        status, headers, _ = await _whole(reader)
        assert (status, headers["connection"]) == (413, "close")
        writer.close()


@on_uvloop
async def test_many_large_bodies_share_a_budget() -> None:
    settings = GatewaySettings(bodies_limit_bytes=100_000, drain_s=1.0)
    async with serving(settings) as here:
        here.router.reply = lambda request: request.say("fine", EndReason.LENGTH)
        half, half_writer = await here.raw()
        half_writer.write(http_post(_CHAT, b" " * 70_000, "Content-Length: 70001"))
        async with asyncio.timeout(WAIT_S):
            while (await here.client.post(_CHAT, json=chat_body(" " * 40_000))).status_code != 429:
                pass
        half_writer.close()
        await _until(here, model="", status="499")
        response = await here.client.post(_CHAT, json=chat_body(" " * 40_000))
        assert response.json()["error"]["code"] == "context_length_exceeded", "there is room again"
        assert not await half.read()


@on_uvloop
async def test_a_body_that_never_ends_times_out() -> None:
    async with serving(GatewaySettings(body_timeout_s=0.1, drain_s=1.0)) as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, b'{"model": ', "Content-Length: 1000"))
        status, headers, _ = await _whole(reader)
        assert (status, headers["connection"]) == (408, "close")
        writer.close()


@pytest.mark.parametrize(
    ("kind", "status"),
    [("text/plain", 415), ("", 415), ("application/json; charset=utf-8", 200), ("application/x+json", 200)],
)
@on_uvloop
async def test_content_types(kind: str, status: int) -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say("fine", EndReason.LENGTH)
        data = msgspec.json.encode(chat_body())
        response = await here.client.post(_CHAT, content=data, headers={"content-type": kind} if kind else {})
        assert response.status_code == status


@pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("br", 415), ("Identity", 200)])
@on_uvloop
async def test_a_body_that_is_said_to_be_compressed_is_refused_by_that_name(coding: str, status: int) -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say("fine", EndReason.LENGTH)
        headers = {"content-type": "application/json", "content-encoding": coding}
        response = await here.client.post(_CHAT, content=msgspec.json.encode(chat_body()), headers=headers)
        assert response.status_code == status
        assert status == 200 or f"'{coding}'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("192.0.2.7", 200),
        ("LocalHost.:8080", 200),
        ("app.localhost", 200),
        ("llm.example.com:443", 200),
        ("", 200),
        ("example.com", 403),
        ("rebound.attacker.test:8080", 403),
        ("127.0.0.1.attacker.test", 403),
        ("[attacker.test]", 403),
    ],
)
@on_uvloop
async def test_a_request_for_a_host_that_is_not_this_one_is_refused(host: str, status: int) -> None:
    async with serving(hosts=("LLM.example.com",)) as here:
        for path in ("/v1/models", "/healthz", "/nowhere"):
            response = await here.client.get(path, headers={"host": host})
            assert (response.status_code == 403) == (status == 403)
        response = await here.client.post(_CHAT, json=chat_body(), headers={"host": host, "content-type": "text/plain"})
        assert response.status_code == (403 if status == 403 else 415)
        assert status == 200 or response.json()["error"]["code"] == "wrong_host"


@on_uvloop
async def test_headers_that_never_end_or_do_not_come() -> None:
    settings = GatewaySettings(header_limit_bytes=4096, drain_s=1.0)
    async with serving(settings) as here:
        reader, writer = await here.raw()
        writer.write(b"GET / HTTP/1.1\r\n" + b"X-Long: y\r\n" * 1000)
        status, _, answer = await asyncio.wait_for(_whole(reader), WAIT_S)
        assert status == 431
        assert "4096 bytes" in msgspec.json.decode(answer)["error"]["message"]
        assert await reader.read() == b""
        assert here.metric("sllm_connections_dropped_total", reason="long headers") == 1
        # From here on only: the others' headers may come as late as they like.
        msgspec.structs.force_setattr(settings, "header_timeout_s", 0.05)
        silent, silent_writer = await here.raw()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await asyncio.wait_for(silent.readexactly(1), WAIT_S)
        assert here.metric("sllm_connections_dropped_total", reason="slow headers") == 1
        for each in (silent_writer, writer):
            each.close()


@on_uvloop
async def test_a_stop_of_the_server_ends_in_time_and_says_so() -> None:
    async with serving(GatewaySettings(drain_s=1.0)) as here:
        pairs = [await here.raw() for _ in range(2)]
        for stream, (_, writer) in enumerate(pairs):
            writer.write(http_post(_CHAT, chat_body(stream=bool(stream))))
        requests = [await here.router.taken() for _ in pairs]
        for request in requests:
            request.say("begun")
        await asyncio.wait_for(pairs[1][0].readuntil(b"begun"), WAIT_S)
    assert all(request.cancelled.is_set() for request in requests)
    assert (await _whole(pairs[0][0]))[0] == 503
    rest = await asyncio.wait_for(pairs[1][0].read(), WAIT_S)
    assert b'"code":"unreachable"' in rest
    assert b"[DONE]" not in rest
    for _, writer in pairs:
        writer.close()


@on_uvloop
async def test_a_stop_of_the_server_lets_a_stream_end() -> None:
    streams: list[asyncio.Task[bytes]] = []
    requests: list[FakeRequest] = []
    async with serving(GatewaySettings(drain_s=60.0)) as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(stream=True)))
        requests.append(await here.router.taken())
        requests[0].say("begun")
        await asyncio.wait_for(reader.readuntil(b"begun"), WAIT_S)
        streams.append(asyncio.create_task(reader.read()))
        asyncio.get_running_loop().call_later(0.2, requests[0].say, " and ended", EndReason.LENGTH)
    data = await asyncio.wait_for(streams[0], WAIT_S)
    assert b"and ended" in data
    assert data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    writer.close()

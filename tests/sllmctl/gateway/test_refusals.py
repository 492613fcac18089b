"""What the OpenAI API answers when something goes wrong."""

from __future__ import annotations

import asyncio
import json

import pytest

from schema.checkpoint import TextDefaults
from schema.errors import (
    Cancelled,
    ContextOverflow,
    InvalidCheckpoint,
    NotFound,
    Overloaded,
    SllmError,
    TimedOut,
    Unschedulable,
)
from schema.states import EndReason
from sllmctl.gateway.settings import GatewaySettings
from tests.checkpoints import framed_tokenizer
from tests.sllmctl.gateway.harness import TOKENIZER, WAIT_S, FakeAssets, FakeRequest, chat_body, model_named, serving
from tests.sllmctl.gateway.official import says


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("queue is full", 2.5), 429, "overloaded"),
        (Unschedulable("no node has 3 GB"), 503, "unschedulable"),
        (TimedOut("no instance within 120 s"), 504, "timed_out"),
        (ContextOverflow("too long"), 400, "context_length_exceeded"),
        (NotFound("gone meanwhile"), 404, "model_not_found"),
        (Cancelled("by an operator"), 499, "cancelled"),
        (SllmError("odd"), 500, "internal"),
    ],
)
async def test_errors_of_the_router_have_their_status(error: SllmError, status: int, code: str) -> None:
    async with serving() as here:
        here.router.refuse = error
        refused = await here.client.post("/v1/chat/completions", json=chat_body())
        here.router.refuse = None
        here.router.reply = lambda request: request.sequence.fail(error)
        failed = [await here.client.post("/v1/chat/completions", json=chat_body(stream=stream)) for stream in (False, True)]
        for response in (refused, *failed):
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert response.json()["error"]["message"] == error.message
            assert response.headers.get("retry-after") == ("3" if status == 429 else None)
        assert here.metric("sllm_request_errors_total", code=code) == 3
        assert here.metric("sllm_requests_total", model="tiny", status=str(status)) == 3


async def test_an_unforeseen_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: FakeRequest) -> None:
        raise ZeroDivisionError("secret")

    async with serving() as here:
        here.router.reply = broken
        response = await here.client.post("/v1/chat/completions", json=chat_body())
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" in caplog.text


async def test_text_assets_that_are_missing_or_broken() -> None:
    async with serving() as here:
        here.assets.error = TimedOut("no tokenizer within 30 s")
        assert (await here.client.post("/v1/chat/completions", json=chat_body())).status_code == 504
        here.assets.error = None
        tokenizer = (here.assets.directory / "tokenizer.json").read_bytes()
        (here.assets.directory / "tokenizer.json").write_bytes(tokenizer[:100])
        response = await here.client.post("/v1/chat/completions", json=chat_body())
        assert (response.status_code, response.json()["error"]["code"]) == (422, InvalidCheckpoint.code)
        (here.assets.directory / "tokenizer.json").write_bytes(tokenizer)
        here.router.reply = says("x")
        for _ in range(3):
            assert (await here.client.post("/v1/chat/completions", json=chat_body())).status_code == 200
        assert here.assets.asked == 3, "a loaded tokenizer is not asked for again"


async def test_tokens_of_a_checkpoint_that_was_replaced_meanwhile_are_not_for_the_next() -> None:
    async with serving() as here:

        async def late(digest: str, timeout_s: float) -> FakeAssets:
            here.router.routed["tiny"] = model_named("tiny", digest="e" * 64)
            return here.assets

        here.assets.get = late  # type: ignore[method-assign]
        response = await here.client.post("/v1/chat/completions", json=chat_body())
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
        assert "was replaced" in response.json()["error"]["message"]
        assert not here.router.requests


async def test_a_tokenizer_that_fails_at_a_text_fails_that_request_as_the_checkpoints_fault() -> None:
    words = TOKENIZER.to_str()
    one_word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    for tokenizer, why in (
        (framed_tokenizer(words, None), "cannot encode"),
        (framed_tokenizer(words, [4_000_000_000]), "id 4000000000 of this text, beyond its vocabulary"),
        (json.dumps(json.loads(words) | {"model": one_word}), "cannot encode"),
    ):
        async with serving(GatewaySettings(drain_s=1.0)) as here:
            (here.assets.directory / "tokenizer.json").write_text(tokenizer)
            response = await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "a text"})
            assert (response.status_code, response.json()["error"]["code"]) == (422, InvalidCheckpoint.code)
            assert why in response.json()["error"]["message"]
            assert not here.router.requests, "no engine is asked"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tokenizer_that_fails_at_a_reply_fails_that_request_as_the_checkpoints_fault(stream: bool) -> None:
    # It panics at a token that is this character alone: what is cut on the left and on the right overlaps.
    tokenizer = json.loads(TOKENIZER.to_str()) | {"decoder": {"type": "Strip", "content": "x", "start": 1, "stop": 1}}
    async with serving() as here:
        (here.assets.directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        here.router.reply = lambda request: request.say("x", None if stream else EndReason.LENGTH)
        body = {"model": "tiny", "prompt": "a text", "stream": stream}
        response = await here.client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (422, InvalidCheckpoint.code)
        assert "cannot decode" in response.json()["error"]["message"]
        if stream:
            await asyncio.wait_for(here.router.requests[0].cancelled.wait(), WAIT_S)


async def test_a_template_that_refuses_loops_or_is_not_there() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template, why, timeout_s in (("{{ raise_exception('alternate!') }}", "alternate!", 30.0), (loop, "took too long", 0.2)):
        async with serving(GatewaySettings(template_timeout_s=timeout_s, drain_s=1.0), template=template) as here:
            response = await here.client.post("/v1/chat/completions", json=chat_body())
            assert response.status_code == 400
            assert why in response.json()["error"]["message"]
    async with serving(text=TextDefaults()) as here:
        response = await here.client.post("/v1/chat/completions", json=chat_body())
        assert "no chat template" in response.json()["error"]["message"]


async def test_paths_methods_and_health() -> None:
    async with serving() as here:
        for method, path, status, code in (
            ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
            ("POST", "/v1/models", 405, "method_not_allowed"),
            ("DELETE", "/healthz", 405, "method_not_allowed"),
            ("GET", "/v1/nothing", 404, "unknown_path"),
            ("POST", "/v1/chat/completions/", 404, "unknown_path"),
        ):
            response = await here.client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), path
        assert (await here.client.get("/v1/chat/completions")).headers["allow"] == "POST"
        assert (await here.client.get("/readyz")).status_code == 200
        assert (await here.client.head("/healthz")).status_code == 200
        here.ready = False
        assert (await here.client.get("/readyz")).status_code == 503
        assert (await here.client.get("/healthz")).json() == {"status": "ok"}

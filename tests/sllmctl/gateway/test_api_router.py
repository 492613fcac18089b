"""The gateway over the real router: a client's stream from a node's token frames, and its cancel down to the node."""

from __future__ import annotations

import asyncio
import json
import struct

import msgspec

from schema.errors import InvalidCheckpoint
from schema.ids import epoch_of
from schema.link import Cancel, Ended, EngineTiming, Submit, TokenRun
from schema.states import EndReason, InstanceState, RequestState
from tests.sllmctl.gateway.harness import END, TOKENIZER, WAIT_S, Serving, chat_body, http_post, ids_of, serving
from tests.sllmctl.gateway.routing import Bench

_CHAT = "/v1/chat/completions"


async def _submitted(bench: Bench, here: Serving) -> Submit:
    """The next attempt that the router gives to a node."""
    return (await _all_submitted(bench, here))[0]


async def _all_submitted(bench: Bench, here: Serving) -> list[Submit]:
    """The next attempts that the router gives to nodes at once."""
    async with asyncio.timeout(WAIT_S):
        while not (found := [message for _, message in bench.sent if isinstance(message, Submit)]):
            await here.client.get("/healthz")
    bench.sent.clear()
    return found


async def test_a_reply_that_the_tokenizer_cannot_decode_ends_as_failed_down_to_the_node() -> None:
    # It panics at a token that is this character alone: what is cut on the left and on the right overlaps.
    tokenizer = json.loads(TOKENIZER.to_str()) | {"decoder": {"type": "Strip", "content": "x", "start": 1, "stop": 1}}
    bench = Bench()
    bench.warm()
    async with serving(router=bench.router) as here:
        (here.assets.directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        reply = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m", stream=True)))
        submit = await _submitted(bench, here)
        bench.tokens(TokenRun(submit.attempt, 0, tuple(ids_of("x"))))
        answer = await reply
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, InvalidCheckpoint.code)
    assert bench.router.request(submit.request).state is RequestState.FAILED
    assert [message.attempt for _, message in bench.sent if isinstance(message, Cancel)] == [submit.attempt]


async def test_a_stream_goes_on_over_the_loss_of_its_instance() -> None:
    bench = Bench()
    bench.warm()
    async with serving(router=bench.router) as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(model="m", stream=True, seed=3, stream_options={"include_usage": True})))
        first = await _submitted(bench, here)
        bench.tokens(TokenRun(first.attempt, 0, tuple(ids_of("before "))))
        await asyncio.wait_for(reader.readuntil(b"before "), WAIT_S)
        bench.instance(state=InstanceState.BACKOFF)
        bench.instance(epoch=epoch_of(1, 2))
        second = await _submitted(bench, here)
        assert second.generated == tuple(ids_of("before "))
        start = len(second.generated)
        ids = (*ids_of("after"), END)
        bench.tokens(
            TokenRun(second.attempt, start, ids),
            Ended(
                attempt=second.attempt,
                position=start + len(ids),
                reason=EndReason.STOP,
                timing=EngineTiming(cached_tokens=3),
            ),
        )
        data = await asyncio.wait_for(reader.readuntil(b"[DONE]"), WAIT_S)
        assert b'"content":"after"' in data
        assert b'"finish_reason":"stop"' in data
        assert b'"prompt_tokens_details":{"cached_tokens":3}' in data
        writer.close()
    assert bench.router.live == 0


async def test_choices_of_a_user_and_their_log_probabilities_go_on_over_the_loss_of_their_instance() -> None:
    def told(*tokens: int) -> bytes:
        return b"".join(struct.pack("<if", token, -token) for token in tokens)

    bench = Bench()
    bench.warm()
    async with serving(router=bench.router) as here:
        body = chat_body(model="m", seed=3, n=2, user="me", logprobs=True, max_tokens=4)
        task = asyncio.create_task(here.client.post(_CHAT, json=body))
        first = await _all_submitted(bench, here)
        assert [(s.choice, s.tenant, s.params.seed, s.params.logprobs) for s in first] == [(0, "me", 3, 0), (1, "me", 3, 0)]
        bench.tokens(*(TokenRun(s.attempt, 0, (40, 41), told(40, 41)) for s in first))
        bench.tokens(TokenRun(first[0].attempt, 1, (41, 42), told(41, 42)))  # one of them again
        bench.instance(state=InstanceState.BACKOFF)
        bench.sent.clear()
        bench.instance(epoch=epoch_of(1, 2))
        second = await _all_submitted(bench, here)
        assert sorted((s.choice, s.generated) for s in second) == [(0, (40, 41, 42)), (1, (40, 41))]
        for s in second:
            rest = tuple(range(40 + len(s.generated), 44))
            bench.tokens(
                TokenRun(s.attempt, len(s.generated), rest, told(*rest)),
                Ended(
                    attempt=s.attempt,
                    position=4,
                    reason=EndReason.LENGTH,
                    timing=EngineTiming(cached_tokens=5 - 2 * s.choice),
                ),
            )
        answer = (await task).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}, "what one choice finds of another was not cached"
    for choice in answer["choices"]:
        assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [-40, -41, -42, -43]
    assert bench.router.live == 0


async def test_a_client_that_goes_away_is_cancelled_at_its_node() -> None:
    bench = Bench()
    bench.warm()
    async with serving(router=bench.router) as here:
        _, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(model="m")))
        submit = await _submitted(bench, here)
        writer.close()
        async with asyncio.timeout(WAIT_S):
            while not any(message == Cancel(attempt=submit.attempt) for _, message in bench.sent):
                await here.client.get("/healthz")


async def test_an_operators_cancel_and_a_cold_start_that_takes_too_long_are_told() -> None:
    bench = Bench()
    bench.warm()
    async with serving(router=bench.router) as here:
        waiting = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m")))
        bench.router.cancel((await _submitted(bench, here)).request)
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (499, "cancelled")

        waiting = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m")))
        submit = await _submitted(bench, here)
        bench.tokens(TokenRun(submit.attempt, 0, tuple(ids_of("half of"))))
        bench.router.cancel(submit.request)
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (499, "cancelled")

        bench.instance(state=InstanceState.STOPPED)
        waiting = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m")))
        async with asyncio.timeout(WAIT_S):
            while bench.router.model_counts("m") != (1, 0):
                await here.client.get("/healthz")
        bench.advance(61)
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timed_out")


async def test_usage_and_context_are_the_routers() -> None:
    bench = Bench()
    bench.warm()
    bench.instance(context=64)
    async with serving(router=bench.router) as here:
        response = await here.client.post("/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 64})
        assert response.json()["error"]["code"] == "context_length_exceeded"
        waiting = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m")))
        submit = await _submitted(bench, here)
        assert len(submit.prompt) + submit.params.max_tokens == 64
        bench.tokens(TokenRun(submit.attempt, 0, (END,)), Ended(attempt=submit.attempt, position=1, reason=EndReason.STOP))
        usage = msgspec.json.decode((await waiting).content)["usage"]
        assert usage == {"prompt_tokens": len(submit.prompt), "completion_tokens": 1, "total_tokens": len(submit.prompt) + 1}

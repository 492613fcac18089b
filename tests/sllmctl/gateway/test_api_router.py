"""The gateway over the real router: a client's stream from a node's token frames, and its cancel down to the node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from tokenizers import Regex, Tokenizer, decoders

from schema.errors import Fault, InvalidCheckpoint, Overloaded
from schema.ids import epoch_of
from schema.link import Cancel, Ended, EngineTiming, Submit, TokenRun
from schema.states import EndReason, InstanceState, RequestState
from sllmctl.gateway.detokenize import DetokenizerFactory
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.gateway.settings import GatewaySettings
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


async def test_a_reply_that_the_tokenizer_cannot_decode_ends_as_failed_down_to_the_node(
    caplog: pytest.LogCaptureFixture,
) -> None:
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
    told = bench.router.request(submit.request)
    sentence = (
        "the model's tokenizer cannot decode what the model said: the tokenizers library broke down over it; "
        "the manager's log has its words"
    )
    assert (told.state, told.fault) == (RequestState.FAILED, Fault(InvalidCheckpoint.code, sentence))
    assert answer.json()["error"]["message"] == sentence
    (panic,) = [record.getMessage() for record in caplog.records if record.name == "sllmctl.gateway.tokenizer_faults"]
    assert panic.startswith(sentence.split(": the tokenizers")[0] + ": the tokenizers library panicked: ")
    assert [message.attempt for _, message in bench.sent if isinstance(message, Cancel)] == [submit.attempt]


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every decoding on a thread of its own waits for this event."""
    event = threading.Event()
    decode = DetokenizerFactory._decode

    def waits(self: DetokenizerFactory, ids: list[int]) -> str:
        event.wait(WAIT_S)
        return decode(self, ids)

    monkeypatch.setattr(DetokenizerFactory, "_decode", waits)
    yield event
    event.set()


@contextlib.asynccontextmanager
async def _decoding_aside(bench: Bench, timeout_s: float) -> AsyncIterator[Serving]:
    """A gateway whose model's decoder is kept off the loop, and is waited for so long."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("z"), "*")])
    bench.warm()
    async with serving(GatewaySettings(encode_timeout_s=timeout_s, drain_s=1.0), router=bench.router) as here:
        tokenizer.save(str(here.assets.directory / "tokenizer.json"))
        yield here


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ended", [False, True])
async def test_a_reply_that_is_decoded_too_slowly_is_told_as_failed(ended: bool, stream: bool, stuck: threading.Event) -> None:
    bench = Bench()
    async with _decoding_aside(bench, 0.05) as here:
        body = chat_body(model="m", stream=stream, max_tokens=2, stop=None if ended else "!")
        reply = asyncio.create_task(here.client.post(_CHAT, json=body))
        submit = await _submitted(bench, here)
        said = (TokenRun(submit.attempt, 0, tuple(ids_of("hi" if ended else "h"))),)
        end = (Ended(attempt=submit.attempt, position=2, reason=EndReason.LENGTH),)
        bench.tokens(*said, *(end if ended else ()))
        answer = await reply
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, Overloaded.code)
    told = bench.router.request(submit.request)
    assert told.state is RequestState.FAILED
    assert told.fault == Fault(Overloaded.code, answer.json()["error"]["message"])
    cancelled = [message.attempt for _, message in bench.sent if isinstance(message, Cancel)]
    assert cancelled == ([] if ended else [submit.attempt])


async def test_a_reply_that_a_bug_of_ours_ends_is_told_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> str:
        raise ZeroDivisionError("inner words")

    bench = Bench()
    async with _decoding_aside(bench, WAIT_S) as here:
        monkeypatch.setattr(DetokenizerFactory, "_decode", breaks)
        reply = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m", stream=True)))
        submit = await _submitted(bench, here)
        bench.tokens(TokenRun(submit.attempt, 0, tuple(ids_of("hi"))))
        answer = await reply
    assert answer.status_code == 500
    told = bench.router.request(submit.request)
    assert told.state is RequestState.FAILED
    assert told.fault == Fault("internal", "an internal error; the manager's log has the details")


async def test_a_reply_that_the_managers_end_cuts_short_is_told_as_failed() -> None:
    bench = Bench()
    bench.warm()
    async with serving(GatewaySettings(drain_s=1.0), router=bench.router) as here:
        reply = asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m", stream=True)))
        submit = await _submitted(bench, here)
        bench.tokens(TokenRun(submit.attempt, 0, tuple(ids_of("hi"))))
        here.stop()
        told = msgspec.json.decode((await reply).text.rpartition("data: ")[2])["error"]["message"]
        assert here.metric("sllm_request_errors_total", code="unreachable") == 1
    view = bench.router.request(submit.request)
    assert (view.state, view.fault) == (RequestState.FAILED, Fault("unreachable", told))
    assert "the manager is stopping" in told


async def test_a_reply_that_was_decoded_too_slowly_is_failed_until_a_retry_reads_it(stuck: threading.Event) -> None:
    bench = Bench(RouterSettings(retry_grace_s=100.0))

    async with _decoding_aside(bench, 0.05) as here:

        async def ask(key: str) -> int:
            headers = {"Idempotency-Key": key}
            return (await here.client.post(_CHAT, json=chat_body(model="m", stop="!"), headers=headers)).status_code

        async def begun(key: str) -> Submit:
            asked = asyncio.create_task(ask(key))
            submit = await _submitted(bench, here)
            bench.tokens(TokenRun(submit.attempt, 0, tuple(ids_of("hi"))))
            assert await asked == 429
            assert bench.router.request(submit.request).state is RequestState.RUNNING, "a retry may come for it"
            return submit

        forgotten = await begun("a")
        bench.advance(101)
        told = bench.router.request(forgotten.request)
        assert told.state is RequestState.FAILED
        assert told.fault is not None
        assert told.fault.code == Overloaded.code

        kept = await begun("b")
        bench.tokens(Ended(attempt=kept.attempt, position=2, reason=EndReason.LENGTH))
        told = bench.router.request(kept.request)
        assert told.state is RequestState.FAILED
        stuck.set()
        status = 429
        async with asyncio.timeout(WAIT_S):
            while status == 429:  # those that were stuck may hold the threads for a moment yet
                status = await ask("b")
        assert status == 200
        told = bench.router.request(kept.request)
        assert (told.state, told.fault) == (RequestState.FINISHED, None)


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

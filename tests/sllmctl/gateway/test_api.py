"""The OpenAI API as its own client sees it: shapes, streams, parameters, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import openai
import pytest

from schema.checkpoint import TextDefaults
from schema.errors import (
    Cancelled,
    ContextOverflow,
    InvalidCheckpoint,
    LinkError,
    NotFound,
    Overloaded,
    SllmError,
    TimedOut,
    Unschedulable,
)
from schema.link import SamplingParams
from schema.states import EndReason
from sllmctl.gateway.settings import GatewaySettings
from tests.sllmctl.gateway.harness import CONTEXT_TOKENS, END, FakeRequest, Serving, chat_body, ids_of, model_named, serving


def _client(here: Serving) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=10)


def _says(text: str, finish: EndReason = EndReason.STOP, *, batch: int = 3) -> Any:
    """A reply that comes in batches of tokens, its end token last."""

    def reply(request: FakeRequest) -> None:
        ids = ids_of(text) + ([END] if finish == EndReason.STOP else [])

        async def emit() -> None:
            for start in range(0, len(ids), batch):
                last = start + batch >= len(ids)
                request.sequence.emit(ids[start : start + batch], finish if last else None)
                await asyncio.sleep(0)

        request.emitting = asyncio.create_task(emit())  # type: ignore[attr-defined]

    return reply


async def _events(here: Serving, path: str, body: dict[str, object]) -> list[str]:
    response = await here.client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


# --- The official client ------------------------------------------------------------------------------------------


async def test_a_chat_in_one_piece() -> None:
    async with serving() as here, _client(here) as client:
        here.router.reply = _says("It stöps. 🙂")
        reply = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Does it?"}])
    assert reply.object == "chat.completion"
    assert reply.id == "chatcmpl-" + "0" * 26
    assert reply.model == "tiny"
    assert reply.system_fingerprint == "fp_" + "d" * 12
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "It stöps. 🙂"
    assert reply.choices[0].finish_reason == "stop"
    request = here.router.requests[0]
    assert request.prompt_text == "<|begin|><|turn|>user\nDoes it?<|end|>\n<|turn|>assistant\n"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(request.sequence.prompt)
    assert reply.usage.completion_tokens == len(request.sequence.tokens)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert request.sequence.waits == 1, "without stop strings nobody is woken before the end"
    assert not request.cancelled.is_set()


async def test_a_chat_as_a_stream() -> None:
    async with serving() as here, _client(here) as client:
        here.router.reply = _says("naïve 🙂 text", batch=1)
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "naïve 🙂 text"
    assert len([text for text in texts if text]) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert not chunks[-1].choices
    assert usage is not None
    assert usage.completion_tokens == len(here.router.requests[0].sequence.tokens)


async def test_completions_of_text_and_of_tokens() -> None:
    async with serving() as here, _client(here) as client:
        here.router.reply = _says(" end", EndReason.LENGTH)
        reply = await client.completions.create(model="tiny", prompt="begin", max_tokens=4)
        assert (reply.object, reply.id[:5]) == ("text_completion", "cmpl-")
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (" end", "length")
        stream = await client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " end"
        await client.completions.create(model="tiny", prompt=[[8, 9]], max_tokens=4)
        await client.completions.create(model="tiny", prompt=["begin"])
    prompts = [request.sequence.prompt for request in here.router.requests]
    assert prompts == [prompts[0], (5, 6, 7), (8, 9), prompts[0]]
    assert here.router.requests[0].prompt_text == "begin"
    assert [request.params.max_tokens for request in here.router.requests] == [4, 4, 4, 16]


async def test_the_synchronous_client() -> None:
    def talk(url: str) -> tuple[list[str], str | None, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            names = [model.id for model in client.models.list()]
            whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
            stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return names, whole.choices[0].message.content, text

    async with serving() as here:
        here.router.reply = _says("hello")
        assert await asyncio.to_thread(talk, here.url) == (["tiny"], "hello", "hello")


async def test_models() -> None:
    async with serving() as here, _client(here) as client:
        here.router.routed["other"] = model_named("other")
        assert [model.id async for model in client.models.list()] == ["tiny", "other"]
        model = await client.models.retrieve("tiny")
        assert (model.id, model.object, model.owned_by) == ("tiny", "model", "sllmctl")
        for name in ("nothing", "asleep"):
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(name)


# --- Streams --------------------------------------------------------------------------------------------------------


async def test_what_is_there_together_is_sent_together() -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say("all at once", EndReason.LENGTH)
        events = await _events(here, "/v1/chat/completions", chat_body())
    assert events[-1] == "[DONE]"
    first, text, last = (msgspec.json.decode(event) for event in events[:-1])
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert text["choices"][0]["delta"] == {"content": "all at once"}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert "usage" not in last


async def test_usage_is_in_every_event_when_asked_for() -> None:
    async with serving() as here:
        here.router.reply = _says("abc", EndReason.LENGTH)
        body = chat_body(stream_options={"include_usage": True})
        events = [msgspec.json.decode(event) for event in (await _events(here, "/v1/chat/completions", body))[:-1]]
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    prompt = len(here.router.requests[0].sequence.prompt)
    assert events[-1]["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}


async def test_an_empty_reply_is_a_whole_stream() -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.sequence.emit([END], EndReason.STOP)
        events = await _events(here, "/v1/completions", {"model": "tiny", "prompt": "x"})
        whole = (await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).json()
    assert [msgspec.json.decode(event)["choices"][0]["text"] for event in events[:-1]] == [""]
    assert whole["choices"][0]["text"] == ""
    assert whole["usage"]["completion_tokens"] == 1


async def test_an_error_in_a_stream_is_its_last_event() -> None:
    async with serving() as here, _client(here) as client:
        stream_task = asyncio.create_task(
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True)
        )
        request = await here.router.taken()
        request.say("so far")
        stream = await stream_task
        texts: list[str] = []

        async def read() -> None:
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")
                if "far" in "".join(texts):
                    request.sequence.fail(LinkError("the node broke the protocol"))

        with pytest.raises(openai.APIError, match="broke the protocol"):
            await asyncio.wait_for(read(), 10)
        assert "".join(texts) == "so far"

        here.router.reply = lambda request: request.say("partial", EndReason.CANCELLED)
        events = await _events(here, "/v1/chat/completions", chat_body())
    assert msgspec.json.decode(events[-1])["error"]["code"] == "cancelled"
    assert not any("[DONE]" in event for event in events)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_lie_across_tokens(stream: bool) -> None:
    async with serving() as here:
        here.router.reply = _says("one <en two <end> three", EndReason.LENGTH, batch=1)
        body = chat_body(stop=["<end>", "never"], stream=stream, stream_options={"include_usage": True} if stream else None)
        response = await here.client.post("/v1/chat/completions", json=body)
        request = here.router.requests[0]
        if stream:
            events = [msgspec.json.decode(line[6:]) for line in response.text.split("\n\n")[:-2]]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
            reason, usage = events[-2]["choices"][0]["finish_reason"], events[-1]["usage"]
        else:
            reply = response.json()
            text, reason, usage = (
                reply["choices"][0]["message"]["content"],
                reply["choices"][0]["finish_reason"],
                reply["usage"],
            )
        assert (text, reason) == ("one <en two ", "stop")
        assert usage["completion_tokens"] == len(ids_of("one <en two <end>"))
        assert request.sequence.completed.is_set()


async def test_a_stop_string_cancels_what_still_runs() -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.say("a stop b")
        reply = (await here.client.post("/v1/chat/completions", json=chat_body(stop=" stop"))).json()
        assert reply["choices"][0]["message"]["content"] == "a"
        assert here.router.requests[0].sequence.completed.is_set()
        assert not here.router.requests[0].cancelled.is_set()


async def test_an_unfinished_stop_string_is_sent_at_the_end() -> None:
    async with serving() as here:
        here.router.reply = _says("what <en", EndReason.LENGTH)
        reply = (await here.client.post("/v1/chat/completions", json=chat_body(stop="<end>"))).json()
        assert reply["choices"][0]["message"]["content"] == "what <en"


async def test_before_min_tokens_no_stop_string_ends_a_reply() -> None:
    async with serving() as here:
        here.router.reply = _says("a.b.c.d.", EndReason.LENGTH, batch=2)
        reply = (await here.client.post("/v1/chat/completions", json=chat_body(stop=".", min_tokens=4))).json()
    assert reply["choices"][0]["message"]["content"] == "a.b.c"


# --- Several choices, and log-probabilities -------------------------------------------------------------------------


async def test_several_choices_in_one_piece_and_as_a_stream() -> None:
    async with serving() as here, _client(here) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3}
        whole = asyncio.create_task(client.chat.completions.create(**asked))
        request = await here.router.taken()
        for at, sequence in reversed(list(enumerate(request.sequences))):
            sequence.emit(ids_of(f"choice {at}") + [END] * (at == 1), EndReason.STOP if at == 1 else EndReason.LENGTH)
        reply = await whole
        assert [(c.index, c.message.content, c.finish_reason) for c in reply.choices] == [
            (0, "choice 0", "length"), (1, "choice 1", "stop"), (2, "choice 2", "length"),
        ]  # fmt: skip
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(request.sequence.prompt)
        assert reply.usage.completion_tokens == sum(len(sequence.tokens) for sequence in request.sequences)

        opening = asyncio.create_task(
            client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        request = await here.router.taken()
        request.sequences[2].emit(ids_of("two"), EndReason.LENGTH)
        texts, reasons, last = ["", "", ""], ["", "", ""], None
        async for chunk in await opening:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] += choice.finish_reason or ""
                if choice.index == 2 and choice.finish_reason:  # one has ended before the others have begun
                    request.sequences[0].emit(ids_of("ze"))
                if texts[0] == "ze" and choice.index == 0:
                    request.sequences[1].emit(ids_of("one"), EndReason.LENGTH)
                    request.sequences[0].emit(ids_of("ro"), EndReason.LENGTH)
            last = chunk
    assert texts == ["zero", "one", "two"]
    assert reasons == ["length"] * 3
    assert last is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(len(sequence.tokens) for sequence in request.sequences)
    assert here.metric("sllm_live_streams") == 0


async def test_one_choice_that_fails_ends_the_stream_of_all() -> None:
    async with serving() as here, _client(here) as client:
        opening = asyncio.create_task(client.completions.create(model="tiny", prompt="x", n=2, stream=True))
        request = await here.router.taken()
        request.sequences[0].emit(ids_of("a"))
        stream = await opening

        async def read() -> None:
            async for _ in stream:
                request.sequences[1].fail(LinkError("the node broke the protocol"))

        with pytest.raises(openai.APIError, match="broke the protocol"):
            await asyncio.wait_for(read(), 10)
        await asyncio.wait_for(request.cancelled.wait(), 10)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_chat(stream: bool) -> None:
    text = "né🙂!"
    async with serving() as here, _client(here) as client:
        here.router.reply = lambda request: request.sequence.emit([*ids_of(text), END], EndReason.STOP, 2)
        asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
        asked["top_logprobs"] = 2
        if stream:
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
            content = [c for chunk in chunks if chunk.choices[0].logprobs for c in chunk.choices[0].logprobs.content or ()]
            written = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            reply = await client.chat.completions.create(**asked)
            assert reply.choices[0].logprobs is not None
            content = reply.choices[0].logprobs.content or []
            written = reply.choices[0].message.content or ""
    tokens = here.router.requests[0].sequence.tokens
    assert written == text
    assert len(content) == len(tokens)
    assert b"".join(bytes(entry.bytes or ()) for entry in content[:-1]).decode() == text
    assert [entry.logprob for entry in content] == [-0.25] * len(tokens)
    assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.25, -1.25]] * len(tokens)
    assert content[0].token == content[0].top_logprobs[0].token == "n"
    assert content[-1].token == "<|end|>"
    assert any(entry.token.startswith("\\x") for entry in content), "part of a character"


async def test_log_probabilities_of_a_completion() -> None:
    text = "né!"
    async with serving() as here, _client(here) as client:
        here.router.reply = lambda request: request.sequence.emit(ids_of(text), EndReason.LENGTH, 1)
        reply = await client.completions.create(model="tiny", prompt="x", logprobs=1)
        told = reply.choices[0].logprobs
        assert told is not None
        assert told.token_logprobs == [-0.25] * len(told.tokens or ())
        assert told.text_offset == [0, 1, 1, 2]
        assert [list(top.items()) for top in told.top_logprobs or ()] == [[(t, -0.25)] for t in told.tokens or ()]
        assert (told.tokens or [])[1] == "bytes:\\xc3"
        here.router.reply = lambda request: request.sequence.emit(ids_of("one. two"), EndReason.LENGTH, 0)
        cut = await client.completions.create(model="tiny", prompt="x", logprobs=0, stop=".")
        assert cut.choices[0].text == "one"
        assert cut.choices[0].logprobs is not None
        assert cut.choices[0].logprobs.tokens == ["o", "n", "e", "."]
        assert cut.choices[0].logprobs.top_logprobs == [{token: -0.25} for token in "one."]
        plain = await client.completions.create(model="tiny", prompt="x")
        assert plain.choices[0].logprobs is None


# --- Parameters -----------------------------------------------------------------------------------------------------


async def test_parameters_reach_the_engine() -> None:
    async with serving() as here:
        here.router.reply = _says("x")
        body = chat_body(temperature=0.5, top_p=0.25, top_k=7, seed=-1, max_completion_tokens=9, user="me")
        assert (await here.client.post("/v1/chat/completions", json=body)).status_code == 200
        params = here.router.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.25, 7, 9)
    assert params.seed == (1 << 63) - 1
    assert params.stop_token_ids == (END,)
    assert params == SamplingParams(max_tokens=9, temperature=0.5, top_p=0.25, top_k=7, seed=params.seed, stop_token_ids=(END,))


async def test_wishes_of_later_servers_reach_the_engine_too() -> None:
    wishes = {
        "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -2, "frequency_penalty": 2, "min_tokens": 3,
        "logit_bias": {"5": -100, "7": 2.5}, "stop_token_ids": [9, END], "ignore_eos": True, "metadata": {"a": "b"},
        "logprobs": True, "top_logprobs": 20, "user": "me", "n": 2, "max_tokens": 7, "seed": 4,
    }  # fmt: skip

    def reply(request: FakeRequest) -> None:
        for sequence in request.sequences:
            sequence.emit(ids_of("x"), EndReason.LENGTH, 20)

    async with serving() as here:
        here.router.reply = reply
        response = await here.client.post("/v1/chat/completions", json=chat_body(**wishes))
        assert response.status_code == 200, response.text
        request = here.router.requests[0]
    assert request.params == SamplingParams(
        max_tokens=7, seed=4, min_p=0.1, repetition_penalty=1.5, presence_penalty=-2.0, frequency_penalty=2.0, min_tokens=3,
        logit_bias=((5, -100.0), (7, 2.5)), stop_token_ids=(9, END), logprobs=20,
    )  # fmt: skip
    assert (request.tenant, len(request.sequences)) == ("me", 2)


async def test_defaults_are_the_models_own_then_openais() -> None:
    own = TextDefaults(
        has_template=True, temperature=0.3, top_p=0.0, top_k=11, min_p=0.25, repetition_penalty=1.5,
        special_tokens={"bos_token": "", "eos_token": ""},
    )  # fmt: skip
    for defaults, expected in ((None, (1.0, 1.0, 0, 0.0, 1.0)), (own, (0.3, 1.0, 11, 0.25, 1.5))):
        async with serving(text=defaults) as here:
            here.router.reply = _says("x", EndReason.LENGTH)
            for _ in range(2):
                await here.client.post("/v1/chat/completions", json=chat_body())
            first, second = here.router.requests
        params = first.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == expected
        assert params.max_tokens == CONTEXT_TOKENS - len(first.sequence.prompt)
        assert params.seed != second.params.seed, "an unseeded request has noise of its own"


_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "top_logprobs": None,
    "tools": None,
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "store": False,
    "service_tier": "auto",
    "stop": None,
    "max_tokens": None,
    "stream_options": None,
    "metadata": None,
}


async def test_neutral_values_are_accepted() -> None:
    async with serving() as here:
        here.router.reply = _says("x")
        response = await here.client.post("/v1/chat/completions", json=chat_body(**_NEUTRAL))
        assert response.status_code == 200, response.text


_REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_value"),
    ({"top_logprobs": 1}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"min_p": -0.1}, "min_p", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": "x"}}, "logit_bias[...]", "invalid_value"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    ({"min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata[...]", "invalid_value"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ({"tempurature": 1}, "tempurature", "unknown_parameter"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"seed": 1 << 64}, "seed", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"stop": ["a" * 257]}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop[0]", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {}}]}]},
        "messages[0].content[0].image_url",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    ({"model": 5}, "model", "invalid_value"),
    ({"model": "nothing"}, None, "model_not_found"),  # type: ignore[list-item]
    ({"model": "asleep"}, None, "model_not_found"),  # type: ignore[list-item]
]


async def test_what_is_refused_is_refused_by_name() -> None:
    async with serving() as here:
        for change, param, code in _REFUSED:
            response = await here.client.post("/v1/chat/completions", json={**chat_body(), **change})
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (param, code), (change, error)
            assert response.status_code == (404 if code == "model_not_found" else 400)
            assert error["type"] == "invalid_request_error"
            assert error["message"]
        response = await here.client.post("/v1/chat/completions", json={"model": "tiny"})
        assert response.json()["error"]["param"] == "messages"
        assert not here.router.requests


async def test_completions_refuse_by_name_too() -> None:
    refused: list[tuple[dict[str, object], str, str]] = [
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"top_logprobs": 1}, "top_logprobs", "unknown_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"prompt": ["a", "b"]}, "prompt", "unsupported_parameter"),
        ({"prompt": [[1], [2]]}, "prompt", "unsupported_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [1 << 20]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"prompt": [1.5]}, "prompt[0]", "invalid_value"),
        ({"prompt": "x " * CONTEXT_TOKENS * 2}, "prompt", "context_length_exceeded"),
        ({"max_tokens": CONTEXT_TOKENS}, "max_tokens", "context_length_exceeded"),
    ]
    async with serving() as here:
        for change, param, code in refused:
            response = await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **change})
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, param, code), (change, error)
        here.router.reply = _says("x")
        neutral = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "n": 1}
        assert (await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **neutral})).status_code == 200


async def test_messages_of_every_accepted_form() -> None:
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "developer", "content": ""},
    ]
    async with serving(template="{{ messages | tojson }}") as here:
        here.router.reply = _says("x")
        response = await here.client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert response.status_code == 200, response.text
        prompt = msgspec.json.decode(here.router.requests[0].prompt_text)
    assert prompt == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a\nb", "name": "me"},
        {"role": "assistant", "content": "c"},
        {"role": "developer", "content": ""},
    ]


# --- Errors ---------------------------------------------------------------------------------------------------------


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
        here.router.reply = _says("x")
        for _ in range(3):
            assert (await here.client.post("/v1/chat/completions", json=chat_body())).status_code == 200
        assert here.assets.asked == 3, "a loaded tokenizer is not asked for again"


async def test_a_template_that_refuses_loops_or_is_not_there() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    settings = GatewaySettings(template_timeout_s=0.2, drain_s=1.0)
    for template, why in (("{{ raise_exception('alternate!') }}", "alternate!"), (loop, "took too long")):
        async with serving(settings, template=template) as here:
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

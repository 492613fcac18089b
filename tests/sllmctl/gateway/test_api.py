"""The OpenAI API as its own client sees it: shapes and streams."""

from __future__ import annotations

import asyncio

import msgspec
import openai
import pytest

from schema.errors import (
    LinkError,
)
from schema.states import EndReason
from tests.sllmctl.gateway.harness import END, chat_body, ids_of, model_named, serving
from tests.sllmctl.gateway.official import client_of, events_of, says

# --- The official client ------------------------------------------------------------------------------------------


async def test_a_chat_in_one_piece() -> None:
    async with serving() as here, client_of(here) as client:
        here.router.reply = says("It stöps. 🙂")
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


async def test_a_reply_is_named_after_its_request() -> None:
    async with serving() as here:
        here.router.reply = says("yes")
        for asked in ("job_7", "other_7"):
            answer = await here.client.post("/v1/chat/completions", json=chat_body(), headers={"X-Request-Id": asked})
            assert (answer.headers["x-request-id"], answer.json()["id"]) == (asked, f"chatcmpl-{asked}")


async def test_a_chat_as_a_stream() -> None:
    async with serving() as here, client_of(here) as client:
        here.router.reply = says("naïve 🙂 text", batch=1)
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
    async with serving() as here, client_of(here) as client:
        here.router.reply = says(" end", EndReason.LENGTH)
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
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            names = [model.id for model in client.models.list()]
            whole = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
            stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return names, whole.choices[0].message.content, text

    async with serving() as here:
        here.router.reply = says("hello")
        assert await asyncio.to_thread(talk, here.url) == (["tiny"], "hello", "hello")


async def test_models() -> None:
    async with serving() as here, client_of(here) as client:
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
        events = await events_of(here, "/v1/chat/completions", chat_body())
    assert events[-1] == "[DONE]"
    first, text, last = (msgspec.json.decode(event) for event in events[:-1])
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert text["choices"][0]["delta"] == {"content": "all at once"}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert "usage" not in last


async def test_usage_is_in_every_event_when_asked_for() -> None:
    async with serving() as here:
        here.router.reply = says("abc", EndReason.LENGTH)
        body = chat_body(stream_options={"include_usage": True})
        events = [msgspec.json.decode(event) for event in (await events_of(here, "/v1/chat/completions", body))[:-1]]
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    prompt = len(here.router.requests[0].sequence.prompt)
    assert events[-1]["usage"] == {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3}


async def test_an_empty_reply_is_a_whole_stream() -> None:
    async with serving() as here:
        here.router.reply = lambda request: request.sequence.emit([END], EndReason.STOP)
        events = await events_of(here, "/v1/completions", {"model": "tiny", "prompt": "x"})
        whole = (await here.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).json()
    assert [msgspec.json.decode(event)["choices"][0]["text"] for event in events[:-1]] == [""]
    assert whole["choices"][0]["text"] == ""
    assert whole["usage"]["completion_tokens"] == 1


async def test_an_error_in_a_stream_is_its_last_event() -> None:
    async with serving() as here, client_of(here) as client:
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
            await asyncio.wait_for(read(), 60)
        assert "".join(texts) == "so far"

        here.router.reply = lambda request: request.say("partial", EndReason.CANCELLED)
        events = await events_of(here, "/v1/chat/completions", chat_body())
    assert msgspec.json.decode(events[-1])["error"]["code"] == "cancelled"
    assert not any("[DONE]" in event for event in events)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_lie_across_tokens(stream: bool) -> None:
    async with serving() as here:
        here.router.reply = says("one <en two <end> three", EndReason.LENGTH, batch=1)
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
        here.router.reply = says("what <en", EndReason.LENGTH)
        reply = (await here.client.post("/v1/chat/completions", json=chat_body(stop="<end>"))).json()
        assert reply["choices"][0]["message"]["content"] == "what <en"


async def test_before_min_tokens_no_stop_string_ends_a_reply() -> None:
    async with serving() as here:
        here.router.reply = says("a.b.c.d.", EndReason.LENGTH, batch=2)
        reply = (await here.client.post("/v1/chat/completions", json=chat_body(stop=".", min_tokens=4))).json()
    assert reply["choices"][0]["message"]["content"] == "a.b.c"

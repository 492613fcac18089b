"""Several choices of one request, and log-probabilities, as the OpenAI API has them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from schema.errors import (
    LinkError,
)
from schema.states import EndReason
from tests.sllmctl.gateway.harness import END, ids_of, serving
from tests.sllmctl.gateway.official import client_of


async def test_several_choices_in_one_piece_and_as_a_stream() -> None:
    async with serving() as here, client_of(here) as client:
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
    async with serving() as here, client_of(here) as client:
        opening = asyncio.create_task(client.completions.create(model="tiny", prompt="x", n=2, stream=True))
        request = await here.router.taken()
        request.sequences[0].emit(ids_of("a"))
        stream = await opening

        async def read() -> None:
            async for _ in stream:
                request.sequences[1].fail(LinkError("the node broke the protocol"))

        with pytest.raises(openai.APIError, match="broke the protocol"):
            await asyncio.wait_for(read(), 60)
        await asyncio.wait_for(request.cancelled.wait(), 60)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_chat(stream: bool) -> None:
    text = "né🙂!"
    async with serving() as here, client_of(here) as client:
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
    async with serving() as here, client_of(here) as client:
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

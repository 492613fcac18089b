"""``POST /v1/completions``: its body, and the job it makes."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from schema.errors import InvalidInput
from sllmctl.gateway.errors import ALL_KINDS, UnsupportedParameter
from sllmctl.gateway.generate import Gateway, Job
from sllmctl.gateway.keys import IDEMPOTENCY_KEY
from sllmctl.gateway.openai import BodyDecoder, Common, check_stream_options, make_job, stop_strings
from sllmctl.gateway.openapi import operation
from sllmctl.gateway.replies import CompletionChunk, CompletionReply
from sllmctl.gateway.sse import CompletionShape

__all__ = ["completion_job"]

_DEFAULT_TOKENS: Final = 16
"""What this endpoint generates where the client does not say, as OpenAI documents it; less where the context is full."""

Prompt = str | list[str | int | list[int]]


class CompletionBody(Common, frozen=True, kw_only=True):
    """The parameters of completions."""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: int | None = None


_body = BodyDecoder(
    CompletionBody,
    {
        "echo": (False,),
        "suffix": ("",),
    },
)


@operation(
    "Continue a text.",
    CompletionReply,
    body=CompletionBody,
    also=_body.also,
    events=CompletionChunk,
    headers=(IDEMPOTENCY_KEY,),
    errors=ALL_KINDS,
)
async def completion_job(gateway: Gateway, data: bytes) -> Job:
    """The job that a body asks for. Raises InvalidInput and its kin, NotFound, ContextOverflow."""
    body = _body.decode(data)
    include_usage = check_stream_options(body)
    stops = stop_strings(body, gateway.settings)
    if body.best_of not in (None, body.n or 1):
        raise UnsupportedParameter("parameter 'best_of' is not supported by this server (other than n)", "best_of")
    single = _single(body.prompt)
    model, text = await gateway.prepare(body.model)
    if isinstance(single, str):
        prompt = await gateway.text.encode(text, single, model.max_context_tokens)
    else:
        prompt = single
        if max(prompt, default=0) >= text.vocab_size:
            raise InvalidInput(f"prompt: token id {max(prompt)} is beyond the vocabulary of {text.vocab_size}", "prompt")
    if not prompt:
        raise InvalidInput("prompt: it is empty, and this model begins no text by itself", "prompt")
    room = model.max_context_tokens - len(prompt)
    asked = body.max_tokens if body.max_tokens is not None else min(_DEFAULT_TOKENS, max(room, 1))
    return make_job(
        body,
        text,
        prompt,
        model.max_context_tokens,
        max_tokens=asked,
        logprobs=body.logprobs,
        stops=stops,
        include_usage=include_usage,
        shape=CompletionShape,
        where="prompt",
    )


def _single(prompt: Prompt) -> str | list[int]:
    """The one prompt: a string, token ids, or a list of one of either. Raises UnsupportedParameter for several."""
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(item, int) for item in prompt):
        return _ids(prompt)
    if len(prompt) > 1:
        raise UnsupportedParameter("several prompts in one request are not supported by this server; send one each", "prompt")
    only = prompt[0]
    return only if isinstance(only, str) else _ids([only] if isinstance(only, int) else list(only))


def _ids(items: list[str | int | list[int]]) -> list[int]:
    ids = [item for item in items if isinstance(item, int)]
    if min(ids, default=0) < 0:
        raise InvalidInput("prompt: a token id is negative", "prompt")
    return ids

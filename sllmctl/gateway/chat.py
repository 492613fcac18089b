"""``POST /v1/chat/completions``: its body, and the job it makes."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput
from sllmctl.gateway.errors import ALL_KINDS, UnsupportedParameter
from sllmctl.gateway.generate import Gateway, Job
from sllmctl.gateway.keys import IDEMPOTENCY_KEY
from sllmctl.gateway.openai import BodyDecoder, Common, check_stream_options, make_job, stop_strings
from sllmctl.gateway.openapi import operation
from sllmctl.gateway.replies import ChatChunk, ChatReply
from sllmctl.gateway.sse import ChatShape

__all__ = ["chat_job"]

_ROLES: Final = ("assistant", "developer", "system", "user")
_NOT_TEXT: Final = ("image_url", "input_audio", "file", "refusal")
_NOT_SAID: Final = ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")

_Absent = Annotated[Any, Meta(extra_json_schema={"enum": [None]})]
_Empty = Annotated[Any, Meta(extra_json_schema={"enum": [None, "", []]})]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message; of those that are not text only the names are known, to refuse them by."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str | None = None
    image_url: _Absent = None
    input_audio: _Absent = None
    file: _Absent = None
    refusal: _Absent = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A message; what clients echo of an assistant's is accepted as long as it is empty."""

    role: Annotated[str, Meta(extra_json_schema={"enum": _ROLES})]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: _Empty = None
    annotations: _Empty = None
    audio: _Empty = None
    function_call: _Empty = None
    tool_calls: _Empty = None
    tool_call_id: _Empty = None


class ChatBody(Common, frozen=True, kw_only=True):
    """The parameters of chat completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


_body = BodyDecoder(
    ChatBody,
    {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    },
)


@operation(
    "Answer the messages of a chat.",
    ChatReply,
    body=ChatBody,
    also=_body.also,
    events=ChatChunk,
    headers=(IDEMPOTENCY_KEY,),
    errors=ALL_KINDS,
)
async def chat_job(gateway: Gateway, data: bytes) -> Job:
    """The job that a body asks for. Raises InvalidInput and its kin, NotFound, ContextOverflow."""
    body = _body.decode(data)
    include_usage = check_stream_options(body)
    stops = stop_strings(body, gateway.settings)
    messages = [_plain(message, at) for at, message in enumerate(body.messages)]
    model, text = await gateway.prepare(body.model)
    prompt = await gateway.text.encode_chat(text, messages, model.max_context_tokens)
    return make_job(
        body,
        text,
        prompt,
        model.max_context_tokens,
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
        stops=stops,
        include_usage=include_usage,
        shape=ChatShape,
        where="messages",
    )


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidInput("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    return None


def _max_tokens(body: ChatBody) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidInput("max_tokens and max_completion_tokens contradict each other; give one", "max_tokens")
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _plain(message: Message, at: int) -> dict[str, Any]:
    """The message as templates read it, its text in one string."""
    where = f"messages[{at}]"
    if message.role not in _ROLES:
        if message.role in ("tool", "function"):
            raise UnsupportedParameter(
                f"{where}: messages of role {message.role!r} are not supported by this server", f"{where}.role"
            )
        raise InvalidInput(f"{where}.role: {message.role!r} is none of {', '.join(_ROLES)}", f"{where}.role")
    for name in _NOT_SAID:
        if getattr(message, name):
            raise UnsupportedParameter(f"{where}.{name} is not supported by this server", f"{where}.{name}")
    if message.content is None:
        raise InvalidInput(f"{where}.content is required", f"{where}.content")
    plain: dict[str, Any] = {"role": message.role, "content": _text(message.content, where)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text(content: str | list[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for at, part in enumerate(content):
        here = f"{where}.content[{at}]"
        if part.type != "text":
            raise UnsupportedParameter(f"{here}: parts of type {part.type!r} are not supported by this server", f"{here}.type")
        for name in _NOT_TEXT:
            if getattr(part, name) is not None:
                raise UnsupportedParameter(f"{here}.{name} is not supported by this server", f"{here}.{name}")
        if part.text is None:
            raise InvalidInput(f"{here}.text is required", f"{here}.text")
        texts.append(part.text)
    return "\n".join(texts)

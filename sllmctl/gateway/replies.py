"""The bodies of replies in OpenAI's shapes, as types. Events of a stream are written by `sse`, in the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatReply",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionChunkChoice",
    "CompletionLogprobs",
    "CompletionReply",
    "Finish",
    "Health",
    "ModelCard",
    "ModelList",
    "PromptDetails",
    "Readiness",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]

Finish = Literal["stop", "length"]


class PromptDetails(msgspec.Struct, frozen=True):
    """How many tokens of a prompt needed no computing."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of a whole request; details where they are known."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the most probable tokens at a place. Bytes that are no whole characters are written as escapes in ``token``."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The token that came, and the most probable ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat's choice or chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a completion's choice or chunk."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessage(msgspec.Struct, frozen=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One of ``n`` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class CompletionChoice(msgspec.Struct, frozen=True):
    """One of ``n`` continuations."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatReply(_Reply, frozen=True, kw_only=True):
    """The answer of chat completions, whole."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: Sequence[ChatChoice]
    usage: Usage


class CompletionReply(_Reply, frozen=True, kw_only=True):
    """The answer of completions, whole."""

    object: Literal["text_completion"] = "text_completion"
    choices: Sequence[CompletionChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Some more of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """Some more of one answer; ``finish_reason`` comes with the last of it."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class CompletionChunkChoice(msgspec.Struct, frozen=True):
    """Some more of one continuation; ``finish_reason`` comes with the last of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class ChatChunk(_Reply, frozen=True, kw_only=True):
    """The data of an event of a chat's stream, which ``[DONE]`` ends. ``usage`` is there where it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChunk(_Reply, frozen=True, kw_only=True):
    """The data of an event of a completion's stream, which ``[DONE]`` ends. ``usage`` is there where it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is served; ``created`` is when this server began to serve it (Unix seconds)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["sllmctl"] = "sllmctl"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(msgspec.Struct, frozen=True):
    """The manager answers."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """Whether requests can be served, and how many of the cluster's nodes are ready."""

    ready: bool
    nodes_ready: int
    nodes: int

"""The bytes of a reply in OpenAI's shapes: server-sent events of a stream, or one JSON object.

What does not change from one event to the next is encoded once per stream; a token then costs the escaping of its text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

from sllmctl.gateway.logprobs import ScoredToken, Spell, chat_logprobs, completion_logprobs
from sllmctl.gateway.replies import ChatChoice, ChatMessage, ChatReply, CompletionChoice, CompletionReply, Finish, Usage

__all__ = ["DONE", "ChatShape", "CompletionShape", "ReplyHead", "Shape"]

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class ReplyHead(NamedTuple):
    """What all parts of one reply repeat. ``id`` is the request's, without its kind; ``created`` in Unix seconds."""

    id: str
    created: int
    model: str
    fingerprint: str


class Shape(ABC):
    """How one endpoint writes a reply; the two subclasses say what differs.

    ``include_usage``: every event has a ``usage``, null but in the last one. ``spell`` writes tokens whose log-probabilities
    are told.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    reply: ClassVar[Callable[..., ChatReply | CompletionReply]]

    def __init__(self, head: ReplyHead, spell: Spell, *, include_usage: bool) -> None:
        self._spell = spell
        self._head: dict[str, Any] = {
            "id": self.id_prefix + head.id,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._start = b"data: " + _encode({**self._head, "object": self.chunk_object})[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """The event before a choice's first text, if this shape has one."""

    @abstractmethod
    def delta(self, text: str, index: int = 0, scores: Sequence[ScoredToken] = ()) -> bytes:
        """The event of some more text, and of the tokens that it came with where their log-probabilities are told."""

    @abstractmethod
    def closing(self, reason: str, index: int) -> bytes:
        """The event that says why a choice ended."""

    @abstractmethod
    def choice(
        self, text: str, reason: Finish, index: int, scores: Sequence[ScoredToken] | None = None
    ) -> ChatChoice | CompletionChoice:
        """A whole choice; ``scores`` are None where no log-probabilities were asked for."""

    def usage(self, usage: Usage) -> bytes:
        """The event of the usage, which has no choices."""
        return self._start + b'],"usage":' + _encode(usage) + b"}\n\n"

    def whole(self, choices: Sequence[ChatChoice | CompletionChoice], usage: Usage) -> bytes:
        """The reply in one piece."""
        return _encode(self.reply(**self._head, choices=choices, usage=usage))

    def _event(self, index: int, tail: bytes) -> bytes:
        return b'%b{"index":%d,%b}%b' % (self._start, index, tail, self._end)


class ChatShape(Shape):
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    reply = ChatReply

    def opening(self, index: int) -> bytes:
        tail = b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
        return self._event(index, tail)

    def delta(self, text: str, index: int = 0, scores: Sequence[ScoredToken] = ()) -> bytes:
        told = _encode(chat_logprobs(scores, self._spell)) if scores else b"null"
        return self._event(index, b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (_encode(text), told))

    def closing(self, reason: str, index: int) -> bytes:
        return self._event(index, b'"delta":{},"logprobs":null,"finish_reason":"%b"' % reason.encode())

    def choice(self, text: str, reason: Finish, index: int, scores: Sequence[ScoredToken] | None = None) -> ChatChoice:
        told = None if scores is None else chat_logprobs(scores, self._spell)
        return ChatChoice(index, ChatMessage("assistant", text), told, reason)


class CompletionShape(Shape):
    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    reply = CompletionReply

    def opening(self, index: int) -> bytes:
        return b""

    def delta(self, text: str, index: int = 0, scores: Sequence[ScoredToken] = ()) -> bytes:
        told = _encode(completion_logprobs(scores, self._spell)) if scores else b"null"
        return self._event(index, b'"text":%b,"logprobs":%b,"finish_reason":null' % (_encode(text), told))

    def closing(self, reason: str, index: int) -> bytes:
        return self._event(index, b'"text":"","logprobs":null,"finish_reason":"%b"' % reason.encode())

    def choice(self, text: str, reason: Finish, index: int, scores: Sequence[ScoredToken] | None = None) -> CompletionChoice:
        return CompletionChoice(index, text, None if scores is None else completion_logprobs(scores, self._spell), reason)

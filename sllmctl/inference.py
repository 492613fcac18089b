"""A small typed client of the inference API: one streamed chat reply at a time, measured as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal

import httpx
import msgspec

from schema.errors import (
    ContextOverflow,
    InvalidInput,
    LinkError,
    NotFound,
    Overloaded,
    SllmError,
    TimedOut,
    Unauthorised,
    Unreachable,
    Unschedulable,
)
from sllmctl.config import ClientSettings

__all__ = ["ChatOptions", "ChatStream", "Turn"]


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatOptions(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Sampling as the API names it; None leaves it to the model's own defaults."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class _Body(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    model: str
    messages: tuple[Turn, ...]
    stream: Literal[True] | None = None
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Problem(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None
    param: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    """One event of the stream: a piece of a reply, its usage at the end, or the error that ended it."""

    id: str = ""
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Problem | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Problem


_BY_STATUS: dict[int, type[SllmError]] = {
    400: InvalidInput,
    401: Unauthorised,
    404: NotFound,
    413: InvalidInput,
    422: InvalidInput,
    429: Overloaded,
    503: Unschedulable,
    504: TimedOut,
}


class ChatStream:
    """A reply as it comes: iterate over its text, inside a ``with``; leaving early cancels it down to the engine.

    ``request_id``, ``finish_reason`` and the token counts are known when the stream has ended; ``first_token_s`` and
    ``total_s`` are seconds since it was asked for, by this side's clock.
    """

    def __init__(
        self, base_url: str, model: str, turns: Sequence[Turn], options: ChatOptions, settings: ClientSettings
    ) -> None:
        timeout = httpx.Timeout(settings.stream_s, connect=settings.connect_s)
        # A proxy of the environment must not stand between this machine and itself. To read the certificates that are trusted
        # takes longer than many replies, and plain HTTP has no use for them.
        verify = base_url.startswith("https:")
        self._http = httpx.Client(base_url=base_url, timeout=timeout, trust_env=False, verify=verify)
        self._settings = settings
        self._body = msgspec.json.encode(
            _Body(
                model=model,
                messages=tuple(turns),
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=options.max_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
            )
        )
        self.request_id = ""
        self.finish_reason: str | None = None
        self.prompt_tokens = self.generated_tokens = 0
        self.first_token_s: float | None = None
        self.total_s: float | None = None

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text. Raises Unreachable, TimedOut for a silent stream, and what the server answers."""
        began = time.monotonic()
        try:
            for chunk in self._chunks():
                for text in self._take(chunk):
                    if self.first_token_s is None:
                        self.first_token_s = time.monotonic() - began
                    yield text
        except httpx.ConnectError as error:
            raise Unreachable(f"nothing answers at {self._http.base_url}; is `sllmctl serve` running there?") from error
        except httpx.TimeoutException as error:
            raise TimedOut(f"no token came for {self._settings.stream_s:g} s; the reply was given up") from error
        except httpx.TransportError as error:
            raise Unreachable(f"the stream broke off ({error or type(error).__name__}); ask again") from error
        self.total_s = time.monotonic() - began

    def _chunks(self) -> Iterator[_Chunk]:
        headers = {"content-type": "application/json"}
        with self._http.stream("POST", "/v1/chat/completions", content=self._body, headers=headers) as answer:
            if answer.status_code != 200:
                raise _refusal(answer.status_code, answer.read(), answer.headers.get("retry-after"))
            self.request_id = answer.headers.get("x-request-id", "")
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield _chunk(data)
        raise Unreachable("the stream ended before the reply did; ask again")

    def _take(self, chunk: _Chunk) -> Iterator[str]:
        if chunk.error is not None:
            raise _kind(chunk.error.code)(f"the reply failed: {chunk.error.message}")
        self.request_id = self.request_id or chunk.id
        if chunk.usage is not None:
            self.prompt_tokens, self.generated_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta.content:
                yield choice.delta.content


def _chunk(data: str) -> _Chunk:
    try:
        return msgspec.json.decode(data, type=_Chunk)
    except msgspec.DecodeError as error:
        raise LinkError(f"an event of the stream cannot be read: {error}") from error


def _refusal(status: int, body: bytes, retry_after: str | None) -> SllmError:
    try:
        problem = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.DecodeError:
        return LinkError(f"the inference API answered {status} without an error body; is it sllmctl's?")
    kind = _kind(problem.code, _BY_STATUS.get(status, SllmError))
    if kind is Overloaded and retry_after is not None:
        return Overloaded(f"{problem.message}; try again in {retry_after} s", float(retry_after))
    return kind(problem.message)


def _kind(code: str | None, otherwise: type[SllmError] = SllmError) -> type[SllmError]:
    """The class of an error by its code, which says more than a status: those of the tree are told by their own names."""
    return ContextOverflow if code == "context_length_exceeded" else SllmError.by_code.get(code or "", otherwise)

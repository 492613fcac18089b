"""Log-probabilities of a reply's tokens in OpenAI's two shapes: a chat's, and a completion's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sllmctl.gateway.replies import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

__all__ = ["ScoredToken", "Spell", "chat_logprobs", "completion_logprobs"]

Spell = Callable[[int], bytes]
"""The bytes that a token stands for by itself."""


class ScoredToken(NamedTuple):
    """A token of a reply: where its text begins there, its log-probability, and the most probable tokens at its place."""

    token: int
    offset: int
    logprob: float
    top: list[tuple[int, float]]


def chat_logprobs(tokens: Sequence[ScoredToken], spell: Spell) -> ChatLogprobs:
    """The ``logprobs`` of a chat's choice or chunk. Bytes that are no whole characters are written as escapes."""
    content = []
    for scored in tokens:
        data = spell(scored.token)
        top = [TopLogprob(_text(one), logprob, list(one)) for one, logprob in ((spell(token), p) for token, p in scored.top)]
        content.append(TokenLogprob(_text(data), scored.logprob, list(data), top))
    return ChatLogprobs(content)


def completion_logprobs(tokens: Sequence[ScoredToken], spell: Spell) -> CompletionLogprobs:
    """The ``logprobs`` of a completion's choice or chunk. The token that came is always among the most probable ones told."""
    spelt = [_text(spell(scored.token), "bytes:") for scored in tokens]
    return CompletionLogprobs(
        tokens=spelt,
        token_logprobs=[scored.logprob for scored in tokens],
        top_logprobs=[
            {**{_text(spell(token), "bytes:"): logprob for token, logprob in scored.top}, text: scored.logprob}
            for text, scored in zip(spelt, tokens, strict=True)
        ],
        text_offset=[scored.offset for scored in tokens],
    )


def _text(data: bytes, mark: str = "") -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in data)

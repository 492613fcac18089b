"""Log-probabilities of a reply's tokens in OpenAI's two shapes: a chat's, and a completion's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["ScoredToken", "Spell", "chat_logprobs", "completion_logprobs"]

Spell = Callable[[int], bytes]
"""The bytes that a token stands for by itself."""


class ScoredToken(NamedTuple):
    """A token of a reply: where its text begins there, its log-probability, and the most probable tokens at its place."""

    token: int
    offset: int
    logprob: float
    top: list[tuple[int, float]]


def chat_logprobs(tokens: Sequence[ScoredToken], spell: Spell) -> dict[str, Any]:
    """The ``logprobs`` of a chat's choice or chunk. Bytes that are no whole characters are written as escapes."""
    content = []
    for scored in tokens:
        entry = _entry(spell(scored.token), scored.logprob)
        entry["top_logprobs"] = [_entry(spell(token), logprob) for token, logprob in scored.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[ScoredToken], spell: Spell) -> dict[str, Any]:
    """The ``logprobs`` of a completion's choice or chunk. The token that came is always among the most probable ones told."""
    spelt = [_text(spell(scored.token), "bytes:") for scored in tokens]
    return {
        "tokens": spelt,
        "token_logprobs": [scored.logprob for scored in tokens],
        "top_logprobs": [
            {**{_text(spell(token), "bytes:"): logprob for token, logprob in scored.top}, text: scored.logprob}
            for text, scored in zip(spelt, tokens, strict=True)
        ],
        "text_offset": [scored.offset for scored in tokens],
    }


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes, mark: str = "") -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in data)

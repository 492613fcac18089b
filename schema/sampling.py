"""How the tokens of one sequence are chosen, and the form in which their log-probabilities travel."""

from __future__ import annotations

import struct
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from schema.errors import InvalidInput

__all__ = [
    "LOGPROB_BYTES",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "Logprobs",
    "SamplingParams",
    "TokenId",
    "TokenIds",
    "most_scored_tokens",
    "read_logprobs",
]

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = tuple[TokenId, ...]

MAX_LOGPROBS: Final = 20
"""How many of the most probable tokens may be told of at each position."""
MAX_SEED: Final = (1 << 63) - 1
_MAX_BIASES: Final = 1024
_MAX_RECORD_BYTES: Final = 8 << 20
"""Log-probabilities of one sequence, so that its journal fits a frame."""
_PAIR: Final = struct.Struct("<if")
LOGPROB_BYTES: Final = _PAIR.size
"""What a token and its log-probability take of a record."""

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "max_tokens": (1, 1 << 31),
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "seed": (0, MAX_SEED),
    "min_tokens": (0, 1 << 31),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


def most_scored_tokens(count: int) -> int:
    """How long a reply may be whose tokens' log-probabilities are told, and at each of them those of ``count`` others."""
    return _MAX_RECORD_BYTES // (_PAIR.size * (1 + count))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen; all of it per sequence, and of no effect on others in its batch.

    ``temperature`` 0 is greedy. ``min_p`` 0, ``top_k`` 0 and ``top_p`` 1 keep all tokens, ``top_p`` 0 the most probable alone;
    they cut in this order. Noise is keyed by (seed, choice, position), so ``seed`` is always set: the gateway draws one where
    the client gave none.

    ``logit_bias``: (token id, what is added to its logit). ``repetition_penalty`` divides positive logits of tokens that prompt
    or reply have, and multiplies negative ones. ``frequency_penalty`` and ``presence_penalty`` are taken off the logits of
    tokens that the reply has, the first as often as it has them. Biases come first. All is counted from the journal, so that a
    resumed sequence goes on as it would have.

    ``stop_token_ids`` end the sequence, the token included in it, but not before ``min_tokens``. ``max_tokens`` bounds
    generated tokens, those before a resumption included. With ``logprobs`` the log-probability of each token is told, as the
    model has it before any of this, and those of so many of the most probable ones.

    Ranges are checked by `check` and not where a frame is decoded: a bad request fails alone, and closes no link.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: TokenIds = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[TokenId, float], ...] = ()
    logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """True when a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self) -> None:
        """Raises InvalidInput naming a parameter that is out of range or no number."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # nor is a NaN
                raise InvalidInput(f"{name} is {value:g}, which is not between {low:g} and {high:g}", name)
        if len(self.logit_bias) > _MAX_BIASES:
            raise InvalidInput(f"logit_bias has {len(self.logit_bias)} tokens; at most {_MAX_BIASES} are taken", "logit_bias")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidInput("logit_bias has a token twice", "logit_bias")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise InvalidInput(f"logit_bias of token {token} is {bias:g}, which is not between -100 and 100", "logit_bias")
        if self.logprobs is not None:
            self._check_logprobs(self.logprobs)

    def _check_logprobs(self, count: int) -> None:
        if not 0 <= count <= MAX_LOGPROBS:
            raise InvalidInput(f"logprobs is {count}, which is not between 0 and {MAX_LOGPROBS}", "logprobs")
        most = most_scored_tokens(count)
        if self.max_tokens > most:
            raise InvalidInput(
                f"{count} log-probabilities beside each token's own are kept for at most {most} tokens, and max_tokens is "
                f"{self.max_tokens}; ask for fewer of either",
                "logprobs",
            )


class Logprobs(NamedTuple):
    """One position: the token that stands there, its log-probability, and the most probable tokens, the greatest first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def read_logprobs(records: bytes, tokens: int) -> list[Logprobs]:
    """The positions of ``tokens`` tokens: records of equal size, each of (token id, log-probability) as int32 and float32,
    little-endian, first that of the token itself. Raises InvalidInput for bytes that are no such records."""
    size, over = divmod(len(records), tokens) if tokens else (0, len(records))
    if over or size % _PAIR.size or (tokens and not size):
        raise InvalidInput(f"{len(records)} bytes are no log-probabilities of {tokens} tokens")
    positions: list[Logprobs] = []
    for at in range(0, len(records), size or 1):
        pairs = list(_PAIR.iter_unpack(records[at : at + size]))
        (token, logprob), *top = pairs
        positions.append(Logprobs(token, logprob, top))
    return positions

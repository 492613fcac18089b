"""Requests on their way to an engine, and their tokens on the way back."""

from __future__ import annotations

from typing import Final

import msgspec

from schema.errors import Fault
from schema.ids import Epoch
from schema.link.base import Count, Finite, Message, Part
from schema.sampling import SamplingParams, TokenIds
from schema.states import EndReason

__all__ = [
    "STEP_BOUNDS_S",
    "Acked",
    "AttemptTruth",
    "Cancel",
    "Ended",
    "EngineCounts",
    "EngineTiming",
    "InstanceLoad",
    "RetryKey",
    "StepCounts",
    "Submit",
    "TokenRun",
    "Tokens",
    "TruthEnd",
]

STEP_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
"""The upper bounds by which `StepCounts` sorts steps; the last of its counts is of those beyond."""


class RetryKey(Part, frozen=True, kw_only=True):
    """How a client's retry of a request is known: digests of its Idempotency-Key and of what was asked with it, which had so
    many ``choices``."""

    key: str
    body: str
    choices: int = 1


class Submit(Message, frozen=True, kw_only=True, tag="submit"):
    """Run one attempt of a sequence on an instance, from its journal: ``prompt`` and the ``generated`` tokens so far.

    The first new token has position ``len(generated)``. A known attempt is ignored; an instance that is unknown, of
    another epoch or not ready ends it as lost. ``request``, ``model`` and the ``logprobs`` of ``generated`` (as in `TokenRun`)
    travel so that a restarted manager can rebuild the journal from what agents hold, and ``retry`` so that it knows whose
    retries may come for it. ``tenant`` is whom the request is for: tenants take turns, and share no cached prefixes.
    """

    attempt: Epoch
    instance: str
    instance_epoch: Epoch
    request: str
    model: str
    tenant: str = ""
    choice: Count = 0
    prompt: TokenIds
    generated: TokenIds = ()
    logprobs: bytes = b""
    params: SamplingParams
    retry: RetryKey | None = None


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """End an attempt early; answered by its `Ended`: of this ``reason``, or how it ended just before. Unknown ones are ignored.

    The reason is ``stop`` where the whole reply is in what there is of it, which only the gateway can tell, by a stop string.
    """

    attempt: Epoch
    reason: EndReason = EndReason.CANCELLED


class TokenRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """New tokens of one attempt; ``start`` is the position in the sequence of the first of ``ids``.

    ``logprobs`` has one record of equal size for each of them where they were asked for (`schema.sampling.read_logprobs`).
    """

    attempt: Epoch
    start: Count
    ids: TokenIds
    logprobs: bytes = b""

    def since(self, position: int) -> TokenRun:
        """The part of it from ``position`` of the sequence on, which is not before its start."""
        skipped = position - self.start
        size = len(self.logprobs) // len(self.ids) if self.ids else 0
        return TokenRun(self.attempt, position, self.ids[skipped:], self.logprobs[skipped * size :])


class EngineTiming(Part, frozen=True, kw_only=True, omit_defaults=False):
    """What an attempt spent inside the engine, in seconds; ``first_token_s`` is from arrival to its first new token.

    Until then it was queued, then its instance waited for weights that were still being loaded, or computed: ``first_token_s``
    is the sum of ``queued_s``, ``weights_s`` and ``prefill_s``. ``cached_tokens`` at its beginning needed no computing: their
    keys and values were found in the prefix cache.
    """

    queued_s: Finite = 0.0
    weights_s: Finite = 0.0
    prefill_s: Finite = 0.0
    first_token_s: Finite = 0.0
    total_s: Finite = 0.0
    steps: Count = 0
    cached_tokens: Count = 0


class Ended(Part, frozen=True, kw_only=True):
    """The one end of an attempt, after ``position`` tokens of the sequence (those it was resumed from included)."""

    attempt: Epoch
    position: Count
    reason: EndReason
    fault: Fault | None = None
    timing: EngineTiming | None = None


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """All new tokens and ends of one engine step (or of several, coalesced). ``frame`` counts from 1 per connection."""

    frame: Count
    runs: tuple[TokenRun, ...] = ()
    ends: tuple[Ended, ...] = ()


class Acked(Message, frozen=True, kw_only=True, tag="acked"):
    """Credit and acknowledgement: all `Tokens` up to ``frame`` were taken in; the ``ends`` need not be kept any more."""

    frame: Count
    ends: tuple[Epoch, ...] = ()


class AttemptTruth(Message, frozen=True, kw_only=True, tag="attempt"):
    """Part of a truth: an attempt as the speaker holds it: how it was asked for, its new tokens since with their
    ``logprobs`` (as in `TokenRun`), and its end if it has one."""

    submit: Submit
    new_ids: TokenIds = ()
    logprobs: bytes = b""
    end: Ended | None = None

    @property
    def run(self) -> TokenRun:
        """Its new tokens as a run."""
        return TokenRun(self.submit.attempt, len(self.submit.generated), self.new_ids, self.logprobs)


class TruthEnd(Message, frozen=True, kw_only=True, tag="truthend"):
    """The truth is complete; ``attempts`` were stated."""

    attempts: Count


class StepCounts(Part, frozen=True, kw_only=True):
    """Steps of one kind since the instance became ready: how many took up to each of `STEP_BOUNDS_S`, and how long all took."""

    by_duration: tuple[int, ...] = ()
    total_s: float = 0.0


class EngineCounts(Part, frozen=True, kw_only=True):
    """What an engine has done since its instance became ready; each number only grows.

    ``decode`` are the steps in which every sequence computed one token, ``prefill`` those with a prompt among them.
    ``sequences`` is the sum of their batch sizes. Of ``prompt_tokens``, those of admitted sequences, ``cached_tokens`` were
    found in the prefix cache; ``preemptions`` gave their KV cache back for want of room.
    """

    decode: StepCounts = StepCounts()
    prefill: StepCounts = StepCounts()
    sequences: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0


class InstanceLoad(Message, frozen=True, kw_only=True, tag="load"):
    """How busy an instance is, for people to see; said when it changed, at most every 100 ms. ``counts`` come along."""

    instance: str
    epoch: Epoch
    running: Count
    waiting: Count
    kv_used_tokens: Count
    counts: EngineCounts | None = None

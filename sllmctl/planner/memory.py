"""How much of a device an instance takes: the rule for its KV cache.

A spec's ``engine.kv_bytes`` is taken as it is. Otherwise, with the context c of the spec or checkpoint, whichever is shorter:

* wanted: ``kv_sequence_tokens`` tokens for each of ``kv_sequences`` sequences, in all; less if the spec's max_concurrency
  sequences of c tokens need less;
* least: min(c, ``kv_least_tokens``) tokens; a device with less room than that is no candidate;
* given: what is wanted, as far as the device's free memory goes, and no less than the least. On a CPU no more than half of what
  is free, so that the next model finds room too: there are no weights on it that could make way.
"""

from __future__ import annotations

import msgspec

from schema.spec import ModelSpec
from sllmctl.control.records import Checkpoint
from sllmctl.control.settings import ControlSettings

__all__ = ["KvNeed", "context_tokens", "kv_given_bytes", "kv_need"]


class KvNeed(msgspec.Struct, frozen=True):
    """Bytes on each device: with fewer than ``least_bytes`` it does not start, more than ``wanted_bytes`` it is not given."""

    least_bytes: int
    wanted_bytes: int


def context_tokens(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    """The longest prompt and reply together that this model serves."""
    return min(spec.engine.max_context_tokens or checkpoint.max_context_tokens, checkpoint.max_context_tokens)


def kv_need(spec: ModelSpec, checkpoint: Checkpoint, settings: ControlSettings) -> KvNeed:
    """What the KV cache of one instance takes on each device it spans. A cache is spread over the devices evenly."""
    if spec.engine.kv_bytes is not None:
        return KvNeed(spec.engine.kv_bytes, spec.engine.kv_bytes)
    context = context_tokens(spec, checkpoint)
    token_bytes = -(-checkpoint.kv_token_bytes // spec.devices)
    least_tokens = min(context, settings.kv_least_tokens)
    most_tokens = context * spec.scale.max_concurrency
    wanted_tokens = max(least_tokens, min(most_tokens, settings.kv_sequence_tokens * settings.kv_sequences))
    return KvNeed(least_tokens * token_bytes, wanted_tokens * token_bytes)


def kv_given_bytes(need: KvNeed, free_bytes: int, *, cpu: bool) -> int:
    """What is given of ``free_bytes`` (weights already taken off), which are at least ``need.least_bytes``."""
    return max(need.least_bytes, min(need.wanted_bytes, free_bytes // 2 if cpu else free_bytes))

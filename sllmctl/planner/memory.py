"""The working memory of an instance, which is what it takes of a device beside its weights: KV cache, and what a step takes.

A spec's ``engine.kv_bytes`` is the cache's size. Otherwise, with the context c of the spec or checkpoint, whichever is shorter:

* wanted: ``kv_sequence_tokens`` tokens for each of ``kv_sequences`` sequences, in all; less if the spec's max_concurrency
  sequences of c tokens need less;
* least: min(c, ``kv_least_tokens``) tokens; a device with less room than that is no candidate;
* given: what is wanted, as far as the device's free memory goes, and no less than the least. On a CPU no more than half of what
  is free, so that the next model finds room too: there are no weights on it that could make way.

What a step takes at most (`schema.memory`), with a cache of what is wanted, is added to all of these. A checkpoint whose
manifest is older does not say what its steps cost; then nothing is.
"""

from __future__ import annotations

import msgspec

from schema.spec import ModelSpec
from sllmctl.cluster.records import Checkpoint
from sllmctl.cluster.settings import ControlSettings

__all__ = ["WorkingNeed", "context_tokens", "given_bytes", "step_bytes", "working_need"]


class WorkingNeed(msgspec.Struct, frozen=True):
    """Bytes on each device: with fewer than ``least_bytes`` it does not start, more than ``wanted_bytes`` it is not given. Of
    either, ``step_bytes`` are for what a step takes beside the KV cache."""

    least_bytes: int
    wanted_bytes: int
    step_bytes: int = 0


def context_tokens(spec: ModelSpec, checkpoint: Checkpoint) -> int:
    """The longest prompt and reply together that this model serves."""
    return min(spec.engine.max_context_tokens or checkpoint.max_context_tokens, checkpoint.max_context_tokens)


def working_need(spec: ModelSpec, checkpoint: Checkpoint, settings: ControlSettings) -> WorkingNeed:
    """What one instance takes on each device it spans, beside its weights. A cache is spread over the devices evenly."""
    beside = step_bytes(spec, checkpoint, settings)
    if spec.engine.kv_bytes is not None:
        return WorkingNeed(spec.engine.kv_bytes + beside, spec.engine.kv_bytes + beside, beside)
    token_bytes = -(-checkpoint.kv_token_bytes // spec.devices)
    least_tokens = min(context_tokens(spec, checkpoint), settings.kv_least_tokens)
    wanted_tokens = _wanted_tokens(spec, checkpoint, settings)
    return WorkingNeed(least_tokens * token_bytes + beside, wanted_tokens * token_bytes + beside, beside)


def step_bytes(spec: ModelSpec, checkpoint: Checkpoint, settings: ControlSettings) -> int:
    """What a step of an instance takes at most, beside weights and KV cache."""
    if checkpoint.step is None:
        return 0
    if spec.engine.kv_bytes is not None:
        kv_tokens = spec.engine.kv_bytes * spec.devices // max(1, checkpoint.kv_token_bytes)
    else:
        kv_tokens = _wanted_tokens(spec, checkpoint, settings)
    return checkpoint.step.step_bytes(
        sequences=spec.scale.max_concurrency, context_tokens=context_tokens(spec, checkpoint), kv_tokens=kv_tokens
    )


def _wanted_tokens(spec: ModelSpec, checkpoint: Checkpoint, settings: ControlSettings) -> int:
    context = context_tokens(spec, checkpoint)
    most_tokens = context * spec.scale.max_concurrency
    return max(min(context, settings.kv_least_tokens), min(most_tokens, settings.kv_sequence_tokens * settings.kv_sequences))


def given_bytes(need: WorkingNeed, free_bytes: int, *, cpu: bool) -> int:
    """What is given of ``free_bytes`` (weights already taken off), which are at least ``need.least_bytes``."""
    return max(need.least_bytes, min(need.wanted_bytes, free_bytes // 2 if cpu else free_bytes))

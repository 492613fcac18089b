"""What an engine's step takes beside weights and KV cache, from a model's shapes: workers and planner reckon it alike.

Ingest reads the shapes off the model's skeleton once and keeps them in the manifest, so that nobody runs a step to find out.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

__all__ = ["GATHERED_BYTES", "PREFILL_TOKENS", "ROTARY_BLOCK", "SAMPLED_AT_ONCE", "SCORES_AT_ONCE", "StepCosts"]

PREFILL_TOKENS: Final = 512
"""Prompt tokens that one step computes at most, beside the sequences that decode."""
GATHERED_BYTES: Final = 64 << 20
"""What one layer's gathered KV blocks take at most, unless one sequence alone has more."""
ROTARY_BLOCK: Final = 256
"""By so many positions at least the tables of rotary cosines and sines grow."""
SCORES_AT_ONCE: Final = 1 << 22
"""Of attention that torch does not fuse, so many scores of a prompt are made at once."""
SAMPLED_AT_ONCE: Final = 1 << 21
"""So many logits, or one sequence's, are drawn from at once."""
_NOISE_BYTES: Final = 128
"""What the sampler holds for each logit that it draws from: noise is made of 64-bit words, several at a time."""
_Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
_SCORE_BYTES: Final = 24
"""What is held for each score that is written down: the products, those that are bent, a softmax in float32."""


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of one model. ``token_bytes``: activations of one token. ``layer_kv_bytes``: keys and values of one token in one
    layer. ``item_bytes``: of one number, ``head_bytes``: of one head. ``unfused_heads``: the query heads of a model whose
    attention torch does not fuse, else 0.
    """

    token_bytes: _Count
    layer_kv_bytes: _Count
    item_bytes: _Count
    vocab_size: _Count
    unfused_heads: _Count = 0
    head_bytes: _Count = 0

    def activation_bytes(
        self, *, sequences: int, context_tokens: int, kv_tokens: int, prefill_tokens: int = PREFILL_TOKENS
    ) -> int:
        """A step's activations, what attention gathers, the cosines and sines of all positions, with so many
        sequences running, of at most ``context_tokens``, over a KV cache of ``kv_tokens``."""
        context = min(context_tokens, kv_tokens)
        gathered = min(max(GATHERED_BYTES, context * self.layer_kv_bytes), kv_tokens * self.layer_kv_bytes)
        masks = (2 * self.item_bytes + 3) * prefill_tokens * context
        scores = min(max(SCORES_AT_ONCE, self.unfused_heads * context), self.unfused_heads * prefill_tokens * context)
        unfused = scores * _SCORE_BYTES + 2 * self.unfused_heads * self.head_bytes * context
        rotary = 2 * 2 * (context + ROTARY_BLOCK) * self.head_bytes  # twice while the tables grow
        return (prefill_tokens + sequences) * self.token_bytes + 2 * gathered + masks + unfused + rotary

    def logits_bytes(self, *, sequences: int) -> int:
        """Logits of so many sequences, as the model gives them, as requests want them, and their log-probabilities; and the
        noise that is drawn with."""
        logits = sequences * self.vocab_size
        return logits * (2 * self.item_bytes + 8) + min(logits, max(SAMPLED_AT_ONCE, self.vocab_size)) * _NOISE_BYTES

    def step_bytes(self, *, sequences: int, context_tokens: int, kv_tokens: int) -> int:
        """All that a step takes at most."""
        activations = self.activation_bytes(sequences=sequences, context_tokens=context_tokens, kv_tokens=kv_tokens)
        return activations + self.logits_bytes(sequences=sequences)

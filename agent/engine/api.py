"""The interface of an inference engine: token ids in, token ids out, one step at a time. No text, no I/O, no clock waits.

The engine of one worker runs one instance. The worker calls `step` while there is work, and between two steps hands in what
came over its link; so a cancel takes effect within one step. Another engine (vLLM, say) stands behind the same calls.

An attempt's whole state is (prompt, generated tokens, parameters): stopping one and submitting it again elsewhere, from its
tokens, goes on with the same sampling noise, since noise is keyed by (seed, choice, position in the sequence).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from schema.ids import Epoch
from schema.link import Ended, EngineCounts, Submit, TokenRun
from schema.states import EndReason

__all__ = ["Engine", "EngineCapacity", "StepOutput"]


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What the engine can hold: KV cache in tokens, tokens per sequence, sequences running at once; and what a step may take
    beside the KV cache."""

    kv_tokens: int
    max_context_tokens: int
    max_concurrency: int
    activation_bytes: int = 0
    logits_bytes: int = 0


@dataclass(slots=True)
class StepOutput:
    """New tokens and ends of one step, in the order in which they happened; an attempt's tokens come before its end."""

    runs: list[TokenRun] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)


class Engine(Protocol):
    """Continuous batching over one model."""

    @property
    def capacity(self) -> EngineCapacity: ...

    @property
    def running(self) -> int:
        """Sequences that hold KV memory now."""

    @property
    def waiting(self) -> int:
        """Sequences submitted that hold none yet."""

    @property
    def kv_used_tokens(self) -> int: ...

    @property
    def counts(self) -> EngineCounts:
        """What it has done so far."""

    def submit(self, submit: Submit) -> None:
        """Queue an attempt. What cannot run (empty prompt, ids beyond the vocabulary, context over the limit) ends with
        an error in the next step's output; the call itself never raises for its content. Known attempts are ignored."""

    def cancel(self, attempt: Epoch, reason: EndReason = EndReason.CANCELLED) -> None:
        """End an attempt, for this reason, in the next step's output; its KV memory is free before that step computes."""

    def step(self) -> StepOutput:
        """Run one batch: admit, prefill or decode, sample. Returns at once and empty when there is nothing to do.

        A failure ends the sequences that it belongs to with an error, and leaves the others and the engine as they were:
        what fails together, for want of memory say, is computed again one by one.
        """

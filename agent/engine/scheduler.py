"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from agent.engine.blocks import BlockManager
from agent.engine.sequence import Sequence

__all__ = ["Plan", "Scheduler"]


@dataclass(slots=True)
class Plan:
    """One step: sequences that compute one token, then those that prefill a chunk of so many tokens.

    ``full``: sequences that have outgrown all KV memory there is, and hold none any more.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    full: list[Sequence] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.decodes and not self.prefills


class Scheduler:
    """First come, first served. Out of blocks, the newest sequence gives its own back and waits again, first in line.

    ``prefill_tokens`` bounds the prompt tokens of one step, so that a long prompt does not stall those that decode.
    """

    def __init__(self, blocks: BlockManager, prefill_tokens: int) -> None:
        self._blocks = blocks
        self._prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In the order of admission: the last one is the newest."""

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it holds; it must be waiting or running."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._blocks.release(sequence)

    def plan(self) -> Plan:
        """The next step's work; room for every token of it is taken."""
        plan = Plan()
        self._grow(plan)
        self._admit()
        budget = self._prefill_tokens
        for sequence in self.running:
            left = len(sequence.tokens) - sequence.cached
            if left == 1:
                plan.decodes.append(sequence)
            elif budget > 0:
                size = min(left, budget)
                plan.prefills.append((sequence, size))
                budget -= size
        return plan

    def _grow(self, plan: Plan) -> None:
        """Make room for each running sequence's next token, the oldest first."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if self._blocks.extend(sequence, len(sequence.tokens)):
                index += 1
                continue
            newest = self.running.pop()
            self._blocks.release(newest)
            if newest is sequence and index == 0:
                plan.full.append(newest)
            else:
                self.waiting.appendleft(newest)

    def _admit(self) -> None:
        """Let the first in line run while rows and blocks last, a block kept back for each that runs and may soon need it."""
        while self.waiting and self._blocks.free_rows:
            sequence = self.waiting[0]
            if self._blocks.needed(len(sequence.tokens)) + len(self.running) > self._blocks.free:
                return
            self._blocks.admit(sequence)
            self._blocks.extend(sequence, len(sequence.tokens))
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.admitted()

"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.fairness import FairQueue
from agent.engine.sequence import Sequence

__all__ = ["Plan", "Scheduler"]

_LOOKED_AT: Final = 64
"""How far down the line a step looks for someone to admit."""


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

    def sequences(self) -> list[Sequence]:
        """All that compute something."""
        return [*self.decodes, *(sequence for sequence, _ in self.prefills)]

    def parts(self) -> list[Plan]:
        """The same work, each sequence's by itself."""
        return [Plan(decodes=[sequence]) for sequence in self.decodes] + [Plan(prefills=[each]) for each in self.prefills]

    def undo(self) -> None:
        """Nothing of it counts as cached any more."""
        for sequence in self.decodes:
            sequence.cached -= 1
        for sequence, size in self.prefills:
            sequence.cached -= size


class Scheduler:
    """Admits in turns (`FairQueue`). Out of blocks, the newest sequence gives its own back and waits again, first in line.

    A step computes about ``prefill_tokens``: one for each sequence that decodes, and prompts in chunks of what is left, which
    is a quarter at least. So neither does a long prompt stall those that decode, nor do these stall the prompts.
    """

    def __init__(self, blocks: BlockManager, prefill_tokens: int) -> None:
        self._blocks = blocks
        self._budget = prefill_tokens
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        """In the order of admission: the last one is the newest."""
        self.admitted_tokens = self.cached_tokens = self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.join(sequence)

    def remove(self, sequence: Sequence, spoiled: bool = False) -> None:
        """Forget a sequence, waiting or running, and free what it holds, ``spoiled`` when what it wrote last is not sound."""
        if sequence.row < 0:
            self.waiting.take(sequence)
        else:
            self.running.remove(sequence)
            self._blocks.release(sequence, spoiled)
        self.waiting.leave(sequence)

    def plan(self) -> Plan:
        """The next step's work; room for every token of it is taken."""
        plan = Plan()
        self._grow(plan)
        if self.waiting and self._blocks.free_rows:
            self._admit()
        prefilling: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.tokens) - sequence.cached == 1:
                plan.decodes.append(sequence)
                sequence.account.served += 1
                sequence.steps += 1
            else:
                prefilling.append(sequence)
        if prefilling:
            self._share_out(prefilling, max(self._budget - len(plan.decodes), self._budget // 4, 1), plan)
        return plan

    def _grow(self, plan: Plan) -> None:
        """Make room for each running sequence's next token, the oldest first."""
        crowded = [sequence for sequence in self.running if len(sequence.tokens) > len(sequence.blocks) * BLOCK_TOKENS]
        for sequence in crowded:
            while sequence.row >= 0 and not self._blocks.extend(sequence, len(sequence.tokens)):
                newest = self.running.pop()
                self._blocks.release(newest)
                self.preemptions += 1
                if self.running:
                    self.waiting.back(newest)
                else:
                    plan.full.append(newest)
                    self.waiting.leave(newest)

    def _admit(self) -> None:
        """Let those run whose turn it is while rows and blocks last, a block kept back for each that runs and may soon need it.

        Whoever only waits for a prefix that another computes just now is passed over until it can be shared.
        """
        for looked, sequence in enumerate(self.waiting.turns()):
            if not self._blocks.free_rows or looked == _LOOKED_AT:
                return
            if self._blocks.awaits(sequence):
                continue
            if not self._blocks.admit(sequence, reserve=len(self.running)):
                return
            self.waiting.take(sequence)
            self.running.append(sequence)
            self.admitted_tokens += len(sequence.tokens)
            self.cached_tokens += sequence.cached
            sequence.admitted()

    def _share_out(self, prefilling: list[Sequence], budget: int, plan: Plan) -> None:
        """Half of the budget is the oldest's, so that every prompt gets done; the rest goes to those whose tenant was served
        least, the shortest first, so that none waits for a long one."""
        oldest, *others = prefilling
        left = {sequence: len(sequence.tokens) - sequence.cached for sequence in prefilling}
        share = max(-(-budget // 2), budget - sum([left[other] for other in others]))
        others.sort(key=lambda other: (other.account.served, left[other]))
        for sequence, most in ((oldest, share), *((other, budget) for other in others)):
            size = min(left[sequence], most, budget)
            if size <= 0:
                break
            plan.prefills.append((sequence, size))
            sequence.steps += 1
            budget -= size

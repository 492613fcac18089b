"""One attempt inside the engine: what was asked, its tokens, and where its KV cache stands."""

from __future__ import annotations

import time

from agent.engine.counts import TokenCounts
from agent.engine.fairness import Account
from agent.engine.prefix import PrefixChain
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import Ended, EngineTiming, SamplingParams, Submit
from schema.states import EndReason

__all__ = ["Sequence"]


class Sequence:
    """An attempt's state is its tokens; the KV cache of the first ``cached`` of them is only a memo that may be dropped.

    ``row`` is its line in the block tables while it runs, -1 while it waits. ``sound`` of the cached tokens were read since
    they were written, and gave numbers. ``plain``: its logits are drawn from as they are. ``salt`` is that of its prefixes.
    ``watched``: others wait for a prefix that it computes. For ``weights_s`` of its time here the weights were still coming.
    """

    __slots__ = (
        "_admitted_s", "_arrived_s", "_counts", "_first_s", "_most", "account", "arrival", "attempt", "awaited", "blocks",
        "cached", "choice", "found", "params", "plain", "position", "prefixes", "row", "sound", "steps", "stop_ids", "tokens",
        "watched", "weights_s",
    )  # fmt: skip

    def __init__(self, submit: Submit, salt: bytes = b"") -> None:
        self.attempt: Epoch = submit.attempt
        self.params: SamplingParams = submit.params
        self.choice = submit.choice
        self.tokens: list[int] = [*submit.prompt, *submit.generated]
        self.position = len(submit.generated)
        self._most = submit.params.max_tokens
        self.stop_ids = frozenset(submit.params.stop_token_ids)
        early = submit.params.min_tokens > 0 and bool(self.stop_ids)
        self.plain = not (submit.params.logit_bias or submit.params.penalised or early)
        self._counts: TokenCounts | None = None
        self.prefixes = PrefixChain(salt)
        self.awaited = b""
        self.account = Account(submit.tenant)
        self.arrival = 0
        self.cached = 0
        self.sound = 0
        self.found = 0
        self.blocks: list[int] = []
        self.row = -1
        self.steps = 0
        self.watched = False
        self.weights_s = 0.0
        self._arrived_s = time.monotonic()
        self._admitted_s = 0.0
        self._first_s = 0.0

    @property
    def counts(self) -> TokenCounts:
        """Its tokens as penalties count them: those of the prompt matter to the repetition penalty alone."""
        if self._counts is None:
            prompt = len(self.tokens) - self.position
            heeded = self.tokens[:prompt] if self.params.repetition_penalty != 1 else []
            self._counts = TokenCounts(heeded, self.tokens[prompt:])
        return self._counts

    def admitted(self) -> None:
        """Say that it runs now, over what was found cached; only the first time counts as the end of its queueing, and is
        charged to its tenant."""
        if not self._admitted_s:
            self._admitted_s = time.monotonic()
            self.found = self.cached
            self.account.served += len(self.tokens) - self.cached

    def append(self, token: int) -> EndReason | None:
        """Take in a new token; returns how it ends the sequence, if it does."""
        if not self._first_s:
            self._first_s = time.monotonic()
        self.tokens.append(token)
        if self._counts is not None:
            self._counts.add(token)
        self.position = position = self.position + 1
        if token in self.stop_ids:
            return EndReason.STOP
        return EndReason.LENGTH if position >= self._most else None

    def finish(self) -> EndReason | None:
        """How the tokens so far end the sequence, if they do."""
        if self.position and self.tokens[-1] in self.stop_ids:
            return EndReason.STOP
        return EndReason.LENGTH if self.position >= self._most else None

    def ended(self, reason: EndReason, fault: Fault | None = None) -> Ended:
        """The end of this attempt, with what it spent where."""
        now = time.monotonic()
        admitted = self._admitted_s or now
        timing = EngineTiming(
            queued_s=admitted - self._arrived_s,
            weights_s=self.weights_s,
            prefill_s=self._first_s - admitted - self.weights_s if self._first_s else 0.0,
            first_token_s=self._first_s - self._arrived_s if self._first_s else 0.0,
            total_s=now - self._arrived_s,
            steps=self.steps,
            cached_tokens=self.found,
        )
        return Ended(attempt=self.attempt, position=self.position, reason=reason, fault=fault, timing=timing)

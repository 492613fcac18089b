"""The engine: continuous batching of one model, behind `agent.engine.api.Engine`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Final

import torch
from torch import Tensor

from agent.engine.api import EngineCapacity, StepOutput
from agent.engine.attention import KvPool
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.logprobs import LogprobTable
from agent.engine.prefix import prefix_salt
from agent.engine.runner import Runner
from agent.engine.sampler import BROKEN, sample
from agent.engine.scheduler import Plan, Scheduler
from agent.engine.sequence import Sequence
from agent.engine.tally import Tally
from schema.errors import ContextOverflow, Fault, InvalidCheckpoint, InvalidInput, OutOfSpace, SllmError
from schema.ids import Epoch
from schema.link import Ended, EngineCounts, SamplingParams, Submit, TokenRun
from schema.states import EndReason

__all__ = ["BatchEngine"]

_LEAST_WAIT_S: Final = 1e-4
"""So long at least a step waits for weights; what is shorter is the look that finds them there."""
_log = logging.getLogger(__name__)


class BatchEngine:
    """Token ids in, token ids out. ``vocabulary`` bounds token ids, ``capacity`` what runs at once.

    ``model`` is the checkpoint's digest, which salts the names of cached prefixes.
    """

    def __init__(
        self,
        runner: Runner,
        pool: KvPool,
        blocks: BlockManager,
        capacity: EngineCapacity,
        vocabulary: int,
        context_tokens: int,
        prefill_tokens: int,
        model: str,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._blocks = blocks
        self._capacity = capacity
        self._model = model
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._scheduler = Scheduler(blocks, prefill_tokens)
        self._tally = Tally(self._scheduler)
        self._inference = torch.inference_mode()  # to make one takes longer than to enter it
        self._proven = False
        self._known: dict[Epoch, Sequence] = {}
        self._ends: list[Ended] = []

    @property
    def capacity(self) -> EngineCapacity:
        return self._capacity

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def kv_used_tokens(self) -> int:
        return self._blocks.used_tokens

    @property
    def counts(self) -> EngineCounts:
        return self._tally.counts()

    @property
    def proven(self) -> bool:
        """True once a step has shown that every layer attends through this engine, exactly once."""
        return self._proven

    @torch.inference_mode()
    def warm(self) -> None:
        """Run one prefill that nobody sees, while nothing runs: what a first step costs once is then paid.

        Raises InvalidCheckpoint when not every layer attends through this engine, exactly once.
        """
        params = SamplingParams(max_tokens=1, temperature=0)
        submit = Submit(
            attempt=Epoch(0), instance="", instance_epoch=Epoch(0), request="", model="", prompt=(0, 0), params=params
        )
        sequence = Sequence(submit)
        self._blocks.admit(sequence, reserve=0)
        try:
            logits, sequences, _ = self._forward(Plan(prefills=[(sequence, 2)]))
            sample(logits, sequences)
        finally:
            self._blocks.release(sequence, spoiled=True)

    def _forward(self, plan: Plan) -> tuple[Tensor, list[Sequence], list[Sequence]]:
        """The model over a plan. The first time it must attend as the KV geometry says; raises InvalidCheckpoint otherwise."""
        before_s = self._runner.waited_s
        try:
            computed = self._runner.forward(plan)
        finally:
            if (waited_s := self._runner.waited_s - before_s) >= _LEAST_WAIT_S:
                for sequence in self._scheduler.running:
                    sequence.weights_s += waited_s
        if not self._proven:
            attended, layers = self._runner.attended_layers, len(self._pool.layers)
            if attended != list(range(layers)):
                plan.undo()
                raise InvalidCheckpoint(f"{len(attended)} layers attended through the engine, the KV geometry has {layers}")
            self._proven = True
        return computed

    def submit(self, submit: Submit) -> None:
        if submit.attempt in self._known or any(end.attempt == submit.attempt for end in self._ends):
            return
        sequence = Sequence(submit, prefix_salt(self._model, submit.tenant))
        try:
            self._check(submit)
        except SllmError as error:
            self._ends.append(sequence.ended(EndReason.ERROR, Fault.of(error)))
            return
        if (reason := sequence.finish()) is not None:
            self._ends.append(sequence.ended(reason))
            return
        self._known[submit.attempt] = sequence
        self._scheduler.add(sequence)

    def cancel(self, attempt: Epoch, reason: EndReason = EndReason.CANCELLED) -> None:
        sequence = self._known.get(attempt)
        if sequence is not None:
            self._end(sequence, reason, None, self._ends)

    def step(self) -> StepOutput:
        output = StepOutput(ends=self._ends)
        self._ends = []
        plan = self._scheduler.plan()
        for sequence in plan.full:
            del self._known[sequence.attempt]
            output.ends.append(sequence.ended(EndReason.LENGTH))
        if plan.empty:
            return output
        began_s, waited_s = time.perf_counter(), self._runner.waited_s
        with self._inference:
            self._run(plan, output)
        self._tally.stepped(plan, time.perf_counter() - began_s - (self._runner.waited_s - waited_s))
        return output

    def _run(self, plan: Plan, output: StepOutput) -> None:
        """Compute a plan. What fails together is computed again one by one, so that only who cannot be computed alone ends."""
        try:
            sequences, tokens, records = self._compute(plan)
        except Exception as error:
            parts = plan.parts()
            if len(parts) > 1:
                _log.warning("a step of %d sequences failed, and is computed one by one: %s", len(parts), error)
                for part in parts:
                    self._run(part, output)
                return
            _log.exception("a sequence cannot be computed")
            for sequence in plan.sequences():
                self._end(sequence, EndReason.ERROR, _fault(error), output.ends, spoiled=True)
            return
        self._take(sequences, tokens, records, output)

    def _compute(self, plan: Plan) -> tuple[list[Sequence], list[int], Mapping[int, bytes]]:
        """Whose tokens are all computed, and the next of each with its record of log-probabilities by index."""
        logits, sequences, watched = self._forward(plan)
        sound: list[bool] = []
        try:
            if watched:
                sound, logits = _sound(logits[len(sequences) :]), logits[: len(sequences)]
            tokens: list[int] = []
            records: Mapping[int, bytes] = {}
            if sequences:
                logprobs = LogprobTable(logits, sequences)
                tokens = sample(logits, sequences)
                records = logprobs.records(tokens)
        except Exception:
            plan.undo()
            raise
        for sequence, is_sound in zip(watched, sound, strict=True):
            if is_sound:
                self._blocks.publish(sequence)
        return sequences, tokens, records

    def _take(self, sequences: Items[Sequence], tokens: list[int], records: Mapping[int, bytes], output: StepOutput) -> None:
        for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if token == BROKEN:
                fault = Fault(
                    "internal", "the model's output is not a number here; its weights or its numeric type do not bear it"
                )
                self._end(sequence, EndReason.ERROR, fault, output.ends, spoiled=True)
                continue
            if sequence.cached // BLOCK_TOKENS == sequence.sound // BLOCK_TOKENS:
                sequence.sound = sequence.cached
            else:  # a block of it is full
                self._blocks.publish(sequence)
            record = records.get(index, b"") if records else b""
            output.runs.append(TokenRun(sequence.attempt, sequence.position, (token,), record))
            if (reason := sequence.append(token)) is not None:
                self._end(sequence, reason, None, output.ends)

    def _end(
        self, sequence: Sequence, reason: EndReason, fault: Fault | None, ends: list[Ended], spoiled: bool = False
    ) -> None:
        del self._known[sequence.attempt]
        self._scheduler.remove(sequence, spoiled)
        ends.append(sequence.ended(reason, fault))

    def _check(self, submit: Submit) -> None:
        """Raises InvalidInput or ContextOverflow for what can never run here."""
        submit.params.check()
        if not submit.prompt:
            raise InvalidInput("the prompt has no tokens; send at least one", "prompt")
        for ids in (submit.prompt, submit.generated):
            if ids and max(ids) >= self._vocabulary:
                raise InvalidInput(f"token id {max(ids)} is beyond the model's vocabulary of {self._vocabulary}", "prompt")
        for name, ids in (
            ("stop_token_ids", submit.params.stop_token_ids),
            ("logit_bias", tuple(token for token, _ in submit.params.logit_bias)),
        ):
            if ids and max(ids) >= self._vocabulary:
                raise InvalidInput(f"{name}: token id {max(ids)} is beyond the model's vocabulary of {self._vocabulary}", name)
        if submit.params.min_tokens and len(set(submit.params.stop_token_ids)) == self._vocabulary:
            raise InvalidInput("stop_token_ids are all tokens there are, and min_tokens allows none of them", "min_tokens")
        wanted = len(submit.prompt) + submit.params.max_tokens
        if wanted > self._context_tokens:
            raise ContextOverflow(
                f"{len(submit.prompt)} prompt tokens and {submit.params.max_tokens} to generate exceed the context of "
                f"{self._context_tokens} tokens; shorten the prompt or ask for fewer"
            )
        present = len(submit.prompt) + len(submit.generated)
        if present > self._blocks.total * BLOCK_TOKENS:
            raise ContextOverflow(
                f"{present} tokens do not fit this instance's KV memory of {self._blocks.total * BLOCK_TOKENS} tokens; "
                "shorten the prompt, or give the model more kv_bytes"
            )


def _sound(logits: Tensor) -> list[bool]:
    """Of each row, whether all that its token attended to gave numbers."""
    answer: list[bool] = logits.amax(dim=1).isfinite().tolist()
    return answer


def _fault(error: Exception) -> Fault:
    """Why a sequence could not be computed; torch has no error of its own for memory that a CPU has not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Fault.of(OutOfSpace(f"there is not enough memory to compute this sequence: {error}"))
    return Fault.of(error)

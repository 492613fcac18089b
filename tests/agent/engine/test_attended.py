"""What every token attends to, whatever came before: the keys and values of its own sequence's tokens, and no others.

A model without weights: keys, values and queries are functions of token and place, so that the answer is known for each row
without any cache. Around it requests come, share prefixes, are preempted, cancelled, end by a fault or are computed again.
"""

from __future__ import annotations

import random
from itertools import count
from operator import attrgetter

import pytest
import torch
from torch import Tensor

from agent.engine.api import EngineCapacity
from agent.engine.attention import KvPool, LayerAttention
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.engine import BatchEngine
from agent.engine.runner import Runner, StepBatch
from agent.engine.scheduler import Plan
from agent.engine.sequence import Sequence
from schema.ids import Epoch
from tests.agent.engine.models import submit_of
from tests.agent.engine.test_stories import check_blocks
from tests.examples import examples

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 11, 4, 2, 16
LONGEST = 16 * BLOCK_TOKENS
HOWS = (
    LayerAttention(0, 0.5),
    LayerAttention(1, 0.5, window=20),
    LayerAttention(2, 0.5, softcap=5.0),
    LayerAttention(3, 0.5, window=40, bias=torch.tensor([[0.5], [0.1], [0.0], [-0.1]]) * torch.arange(LONGEST)),
    LayerAttention(4, 0.5, sinks=torch.tensor([-5.0, 0.0, 1.0, 5.0])),
)


class _Weightless(Runner):
    """Draws logits at random, breaks down at times, and at times makes keys and values that are not numbers.

    ``wrong``: layers of steps in which a row attended to something else than its own sequence.
    """

    def __init__(self, pool: KvPool, blocks: BlockManager, dice: random.Random, deterministic: bool) -> None:
        super().__init__(pool, blocks, "cpu", deterministic)
        make = torch.Generator().manual_seed(dice.randrange(1 << 30))
        self._of_token = torch.randn((VOCAB, len(HOWS), HEADS + 2 * KV_HEADS, HEAD_DIM), generator=make)
        self._of_place = torch.randn((LONGEST, len(HOWS), HEADS + 2 * KV_HEADS, HEAD_DIM), generator=make)
        self._dice = dice
        self._said: list[Tensor] = []
        self._rows: list[tuple[Sequence, int]] = []
        self._sick = set[Epoch]()
        self.broken = self.wrong = 0

    @property
    def attended_layers(self) -> list[int]:
        return list(range(len(HOWS)))

    def states(self, ids: Tensor, positions: Tensor, layer: int) -> Tensor:
        return self._of_token[ids, layer] + self._of_place[positions, layer]

    def _compute(self, batch: StepBatch) -> Tensor:
        with torch._C.DisableTorchFunction():  # what is done here is no model's
            return self._answer(batch)

    def _answer(self, batch: StepBatch) -> Tensor:
        self._said = []
        positions = batch.positions.clone()
        batch.positions.fill_(0)  # as a model may that adds to them in place
        sick = self._dice.randrange(len(batch.ids)) if self._dice.random() < 0.05 else -1
        breaks_at = self._dice.randrange(len(HOWS)) if self._dice.random() < 0.03 else -1
        for layer, how in enumerate(HOWS):
            states = self.states(batch.ids, positions, layer)
            if not layer and sick >= 0:  # from its own place on, this sequence has no numbers
                self._sick.add(self._rows[sick][0].attempt)
                states[sick] = torch.nan
            said = self._attention(batch.attention, states[:, :HEADS].contiguous(), states[:, HEADS:].contiguous(), how)
            self._said.append(said)
            if layer == breaks_at:
                self.broken += 1
                raise MemoryError("in the middle of a step")
        wanted = self._said[0] if batch.wanted is None else self._said[0][batch.wanted]
        logits = torch.tensor([[self._dice.random() for _ in range(VOCAB)] for _ in wanted]).view(-1, VOCAB)
        logits[wanted.isnan().any(dim=2).any(dim=1)] = torch.nan
        return logits

    def forward(self, plan: Plan) -> tuple[Tensor, list[Sequence], list[Sequence]]:
        rows = [(each, each.cached) for each in sorted(plan.decodes, key=attrgetter("cached"), reverse=True)]
        rows += [(each, at) for each, size in plan.prefills for at in range(each.cached, each.cached + size)]
        self._rows = rows
        answer = super().forward(plan)
        sound = torch.tensor([sequence.attempt not in self._sick for sequence, _ in rows])
        for layer, how in enumerate(HOWS):
            alone = [self._alone(sequence, at, layer, how) for sequence, at in rows]
            if not torch.allclose(self._said[layer][sound], torch.stack(alone)[sound], rtol=1e-4, atol=1e-5):
                self.wrong += 1  # the engine would take an error for the model's
        return answer

    def _alone(self, sequence: Sequence, at: int, layer: int, how: LayerAttention) -> Tensor:
        """[heads, head_dim] of the token at a place, over its sequence's tokens up to there."""
        first = max(0, at + 1 - how.window) if how.window else 0
        places = torch.arange(first, at + 1)
        states = self.states(torch.tensor(sequence.tokens[first : at + 1]), places, layer)
        query, keys, values = states[-1, :HEADS], states[:, HEADS:-KV_HEADS], states[:, -KV_HEADS:]
        of_head = torch.arange(HEADS) // (HEADS // KV_HEADS)
        scores = torch.einsum("hd,thd->ht", query, keys[:, of_head]) * how.scale
        if how.softcap:
            scores = torch.tanh(scores / how.softcap) * how.softcap
        if how.bias is not None:
            scores = scores + how.bias[:, first : at + 1]
        if how.sinks is not None:
            scores = torch.cat((scores, how.sinks.unsqueeze(1)), dim=1)
        return torch.einsum("ht,thd->hd", scores.softmax(dim=1)[:, : len(places)], values[:, of_head])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("attends")
def test_every_token_attends_to_its_own_sequence(deterministic: bool) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    dice = random.Random(seed)
    preemptions = cached = broken = 0
    for number in range(100):
        if number >= examples(8) and preemptions and cached and broken:
            return
        blocks_there, rows = dice.randint(6, 18), dice.randint(2, 6)
        pool = KvPool(len(HOWS), blocks_there, KV_HEADS, HEAD_DIM, torch.float32, "cpu")
        blocks = BlockManager(blocks_there, rows, LONGEST // BLOCK_TOKENS, pool.erase)
        runner = _Weightless(pool, blocks, dice, deterministic)
        capacity = EngineCapacity(blocks_there * BLOCK_TOKENS, LONGEST, rows)
        engine = BatchEngine(runner, pool, blocks, capacity, VOCAB, LONGEST, dice.choice([5, 30, 200]), "m")
        trunks = [[dice.randrange(VOCAB) for _ in range(3 * BLOCK_TOKENS)] for _ in range(2)]
        numbers, live = count(1), set[Epoch]()
        for _ in range(80):
            if dice.random() < 0.35:
                trunk = dice.choice(trunks)
                prompt = trunk[: dice.choice([1, 16, 17, 33])] + [dice.randrange(VOCAB) for _ in range(dice.choice([0, 0, 3]))]
                submit = submit_of(next(numbers), prompt, dice.randint(1, 90), tenant=dice.choice(["", "a"]), temperature=1.0)
                engine.submit(submit)
                live.add(submit.attempt)
            if live and dice.random() < 0.1:
                engine.cancel(dice.choice(sorted(live)))
            output = engine.step()
            live -= {end.attempt for end in output.ends}
            assert not runner.wrong
            check_blocks(engine)
        broken += runner.broken
        preemptions += engine.counts.preemptions
        cached += engine.counts.cached_tokens
    raise AssertionError(f"{preemptions} preemptions, {cached} cached, {broken} broken")

"""Groups of decoding sequences, for attention that gathers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agent.engine import decoding
from agent.engine.attention import DecodeGroup, KvPool
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.decoding import Decoding
from agent.engine.sequence import Sequence
from tests.agent.engine.models import make_model, submit_of
from tests.agent.engine.test_engine import drive, engine_of, prompts, reference


class _Batch:
    """Sequences of these many tokens, the longest first, of which each decodes its last one."""

    def __init__(self, *lengths: int) -> None:
        pool = KvPool(2, 64, 1, 4, torch.float32, "cpu")
        self.manager = BlockManager(64, len(lengths), 16, pool.erase)
        self._decoding = Decoding(pool, self.manager, torch.device("cpu"))
        self.sequences = [Sequence(submit_of(number, [number] * length, 99)) for number, length in enumerate(lengths, 1)]
        for sequence in self.sequences:
            assert self.manager.admit(sequence, reserve=0)

    def groups(self) -> list[DecodeGroup]:
        return self._decoding.groups(self.sequences, np.array([len(sequence.tokens) for sequence in self.sequences]))


def test_a_group_has_its_sequences_tables_padded_to_the_longest() -> None:
    batch = _Batch(2 * BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS, 5)
    (group,) = batch.groups()
    assert (group.start, group.end, group.width, group.run) == (0, 3, 3, -1)
    assert group.lengths.tolist() == [33, 32, 5]
    assert group.blocks.view(3, 3).tolist() == [[*sequence.blocks, 0, 0][:3] for sequence in batch.sequences]


def test_groups_are_cut_where_padding_costs_more_and_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = 2 * BLOCK_TOKENS * 4 * 4
    monkeypatch.setattr(decoding, "_GROUP_COST_BYTES", 3 * block_bytes)
    batch = _Batch(*(blocks * BLOCK_TOKENS for blocks in (8, 7, 6, 4, 4)))
    assert [(group.start, group.end) for group in batch.groups()] == [(0, 3), (3, 5)]
    monkeypatch.setattr(decoding, "GATHERED_BYTES", 16 * block_bytes)
    assert [(group.start, group.end) for group in _Batch(*([8 * BLOCK_TOKENS] * 5)).groups()] == [(0, 2), (2, 4), (4, 5)]


def test_a_lone_sequence_is_read_where_it_lies() -> None:
    batch = _Batch(20)
    (group,) = batch.groups()
    first, second = batch.sequences[0].blocks
    assert group.run == (first if second == first + 1 else -1)


@pytest.mark.usefixtures("attends")
def test_batches_that_change_give_the_tokens_that_each_request_gives_alone() -> None:
    """Some end, some begin, and those that go on have grown over several blocks meanwhile."""
    model: Any = make_model("mistral-window")
    engine = engine_of(model, concurrency=3)
    submits = [submit_of(number, prompt, 10 + 9 * number) for number, prompt in enumerate(prompts()[:5], 1)]
    outcome = drive(engine, submits)
    for submit in submits:
        assert outcome.tokens[submit.attempt] == reference(model, list(submit.prompt), submit.params.max_tokens)

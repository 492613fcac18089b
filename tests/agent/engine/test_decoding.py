"""Groups of decoding sequences: they go on while the sequences do, and what attention keeps for them is what is stored."""

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
    """Sequences of these many tokens, with room to grow, of which each decodes its last one."""

    def __init__(self, *lengths: int, keeps: bool = True) -> None:
        pool = KvPool(2, 64, 1, 4, torch.float32, "cpu")
        self.manager = BlockManager(64, len(lengths), 16, pool.erase)
        self.decoding = Decoding(pool, self.manager, torch.device("cpu"), keeps)
        self.sequences = [Sequence(submit_of(number, [number] * length, 99)) for number, length in enumerate(lengths, 1)]
        for sequence in self.sequences:
            assert self.manager.admit(sequence, reserve=0)

    def step(self, *sequences: Sequence, grow: int = 1) -> list[DecodeGroup]:
        chosen = list(sequences or self.sequences)
        lengths = np.array([len(sequence.tokens) for sequence in chosen])
        groups = self.decoding.groups(chosen, lengths)
        for sequence in chosen:
            sequence.tokens += [0] * grow
            assert self.manager.extend(sequence, len(sequence.tokens))
        return groups


def test_a_group_goes_on_until_its_longest_sequence_outgrows_it() -> None:
    batch = _Batch(2 * BLOCK_TOKENS - 2, 5)
    (first,) = batch.step()
    assert not first.goes_on
    columns = first.width * BLOCK_TOKENS
    for step in (1, 2):
        (same,) = batch.step()
        assert same is first
        assert same.goes_on
        assert same.newest is not None
        assert [divmod(row, columns) for row in same.newest.tolist()] == [
            (0, columns - 3 + step), (1, columns - 3 + step), (2, 4 + step), (3, 4 + step)
        ]  # fmt: skip
    (other,) = batch.step()
    assert not other.goes_on


def test_a_group_does_not_go_on_without_one_of_its_sequences_or_after_a_step_that_failed() -> None:
    batch = _Batch(20, 20, 20)
    first, second, third = batch.sequences
    batch.step()
    assert batch.step()[0].goes_on
    assert not batch.step(first, second)[0].goes_on
    assert batch.step(first, second, grow=0)[0].goes_on
    assert not batch.step(first, second)[0].goes_on, "it is computed again, and what was kept of it may be half written"
    assert not batch.step(third, first)[0].goes_on


@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_not_kept_is_looked_up_again(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if keeps:
        monkeypatch.setattr(decoding, "KEPT_BYTES", 0)
    batch = _Batch(BLOCK_TOKENS, BLOCK_TOKENS - 1, keeps=keeps)
    batch.step()
    held = [(*sequence.blocks, 0)[:2] for sequence in batch.sequences]
    (group,) = batch.step()
    assert group.newest is None
    assert not group.goes_on
    assert group.blocks.view(2, 2).tolist() == [list(blocks) for blocks in held]


def test_a_lone_sequence_is_read_where_it_lies() -> None:
    batch = _Batch(20)
    batch.step()
    (group,) = batch.step()
    assert group.goes_on
    assert group.newest is None
    assert group.run == batch.sequences[0].blocks[0]


def test_batches_that_change_give_the_tokens_that_each_request_gives_alone() -> None:
    """Some end, some begin, and those that go on have grown over several blocks meanwhile."""
    model: Any = make_model("mistral-window")
    engine = engine_of(model, concurrency=3)
    submits = [submit_of(number, prompt, 10 + 9 * number) for number, prompt in enumerate(prompts()[:5], 1)]
    outcome = drive(engine, submits)
    for submit in submits:
        assert outcome.tokens[submit.attempt] == reference(model, list(submit.prompt), submit.params.max_tokens)

"""Runners: they turn a step's plan into the tensors of one flat batch, and that into logits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.engine.attention import AttentionBatch, KvPool, Prefill
from agent.engine.attention_paged import attention_for
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.decoding import Decoding, run_of
from agent.engine.invariant import RowInvariant
from agent.engine.scheduler import Plan
from agent.engine.sequence import Sequence

__all__ = ["AwaitLayer", "Runner", "StepBatch", "all_there"]

AwaitLayer = Callable[[int], None]
"""Returns once the weights of a layer, counted from 0, and of all before it are there; asked for as many as there are layers,
once all are."""


def all_there(layer: int) -> None:
    """The `AwaitLayer` of weights that have all come."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's tokens, one behind the other: ``ids`` and ``positions`` [tokens], the last position, who attends to what.

    ``wanted`` are the tokens whose logits are asked for; None where that is all of them, in order.
    """

    ids: Tensor
    positions: Tensor
    last_position: int
    wanted: Tensor | None
    attention: AttentionBatch


class Runner(ABC):
    """One model on one device. A subclass computes; what the batch is, is the same for all.

    ``deterministic``: a token's logits are the same bits in every batch, chunk and step (`agent.engine.invariant`). A subclass
    that asks ``await_layer`` before each layer may begin while weights are still coming. ``waited_s`` of its steps it waited
    there, in all.
    """

    def __init__(
        self,
        pool: KvPool,
        blocks: BlockManager,
        device: str,
        deterministic: bool = False,
        await_layer: AwaitLayer = all_there,
    ) -> None:
        self._pool = pool
        self._blocks = blocks
        self._device = torch.device(device)
        self._attention = attention_for(pool, deterministic)
        self._within: AbstractContextManager[Any] = RowInvariant() if deterministic else nullcontext()
        self._decoding = Decoding(pool, blocks, self._device)
        self._await = await_layer
        self.waited_s = 0.0

    @property
    @abstractmethod
    def attended_layers(self) -> list[int]:
        """The layers that attended in the last step, in order; for a check of the model."""

    @abstractmethod
    def _compute(self, batch: StepBatch) -> Tensor:
        """Logits [wanted, vocabulary]."""

    def forward(self, plan: Plan) -> tuple[Tensor, list[Sequence], list[Sequence]]:
        """Logits [rows, vocabulary] of the last token of each sequence whose tokens are all computed, then of each chunk that
        others wait for (``watched``); the sequences of the former, and of the latter.

        Marks the plan's tokens as cached. Nothing is marked when the model raises.
        """
        batch, done, watched = self._batch(plan)
        with self._within:
            logits = self._compute(batch)
        for sequence in plan.decodes:
            sequence.cached += 1
        for sequence, size in plan.prefills:
            sequence.cached += size
        return logits, done, watched

    def _await_layer(self, layer: int) -> None:
        """Return once a layer is there, as `AwaitLayer` does; the wait is counted."""
        began_s = time.monotonic()
        try:
            self._await(layer)
        finally:
            self.waited_s += time.monotonic() - began_s

    def _batch(self, plan: Plan) -> tuple[StepBatch, list[Sequence], list[Sequence]]:
        decoding = sorted(plan.decodes, key=attrgetter("cached"), reverse=True)
        done, watched = list(decoding), list[Sequence]()
        ids = [sequence.tokens[-1] for sequence in decoding]
        positions = [sequence.cached for sequence in decoding]
        slots = [_slot(sequence.blocks, at) for sequence, at in zip(decoding, positions, strict=True)]
        rows = [sequence.row for sequence in decoding]
        wanted = list(range(len(decoding)))
        watched_rows: list[int] = []
        prefills: list[Prefill] = []
        for sequence, size in plan.prefills:
            first, last = sequence.cached, sequence.cached + size
            held = _integers(sequence.blocks[: BlockManager.needed(last)])
            prefills.append(Prefill(len(ids), len(ids) + size, first, self._tensor(held), run_of(held)))
            ids += sequence.tokens[first:last]
            positions += range(first, last)
            slots += [_slot(sequence.blocks, at) for at in range(first, last)]
            rows += [sequence.row] * size
            if last == len(sequence.tokens):
                wanted.append(len(ids) - 1)
                done.append(sequence)
            elif sequence.watched:
                watched.append(sequence)
                watched_rows.append(len(ids) - 1)
        wanted += watched_rows
        at = _integers(positions)
        groups = self._decoding.groups(decoding, at[: len(decoding)] + 1) if self._attention.gathers else []
        batch = StepBatch(
            ids=self._tensor(_integers(ids)),
            positions=self._tensor(at.copy()),  # a model's modules may write to theirs; attention's say what memory is read
            last_position=max(positions),
            wanted=None if len(wanted) == len(ids) and not watched else self._tensor(_integers(wanted)),
            attention=AttentionBatch(
                pool=self._pool,
                slots=self._tensor(_integers(slots)),
                tables=self._blocks.tables,
                rows=_integers(rows),
                positions=at,
                decodes=groups,
                prefills=prefills,
            ),
        )
        return batch, done, watched

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _integers(numbers: list[int]) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def _slot(blocks: list[int], position: int) -> int:
    """Where in KV memory a token of a sequence with these blocks goes."""
    return blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

"""Runners: they turn a step's plan into the tensors of one flat batch, and that into logits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.engine.attention import Attention, AttentionBatch, DecodeGroup, KvPool, Prefill
from agent.engine.attention_alone import AloneAttention
from agent.engine.attention_sdpa import SdpaAttention
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.invariant import RowInvariant
from agent.engine.scheduler import Plan
from agent.engine.sequence import Sequence
from schema.memory import GATHERED_BYTES

__all__ = ["AwaitLayer", "Runner", "StepBatch", "all_there"]

AwaitLayer = Callable[[int], None]
"""Returns once the weights of a layer, counted from 0, and of all before it are there; asked for as many as there are layers,
once all are."""

_GROUP_COST_BYTES: Final = 1 << 19
"""A group of decoding sequences more costs a layer about as much time as to gather so many bytes of padding."""


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
        self._attention: Attention = AloneAttention() if deterministic else SdpaAttention()
        self._within: AbstractContextManager[Any] = RowInvariant() if deterministic else nullcontext()
        self._most_waste = max(1, _GROUP_COST_BYTES // pool.block_bytes)
        self._most_blocks = min(GATHERED_BYTES // pool.block_bytes, blocks.total)
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
        done = sorted(plan.decodes, key=attrgetter("cached"), reverse=True)
        decodes = len(done)
        ids = [sequence.tokens[-1] for sequence in done]
        positions = [sequence.cached for sequence in done]
        rows = [sequence.row for sequence in done]
        wanted = list(range(decodes))
        prefills: list[Prefill] = []
        watched: list[Sequence] = []
        watched_rows: list[int] = []
        for sequence, size in plan.prefills:
            first, last = sequence.cached, sequence.cached + size
            held = self._blocks.tables[sequence.row, : BlockManager.needed(last)].copy()
            prefills.append(Prefill(len(ids), len(ids) + size, first, self._tensor(held), _run(held)))
            ids += sequence.tokens[first:last]
            positions += range(first, last)
            rows += [sequence.row] * size
            if last == len(sequence.tokens):
                wanted.append(len(ids) - 1)
                done.append(sequence)
            elif sequence.watched:
                watched.append(sequence)
                watched_rows.append(len(ids) - 1)
        wanted += watched_rows
        at, of = _integers(positions), _integers(rows)
        block, offset = np.divmod(at, BLOCK_TOKENS)
        slots = self._blocks.tables[of, block] * BLOCK_TOKENS + offset
        attention = AttentionBatch(self._pool, self._tensor(slots), self._groups(at[:decodes] + 1, of), prefills)
        batch = StepBatch(
            ids=self._tensor(_integers(ids)),
            positions=self._tensor(at),
            last_position=max(positions),
            wanted=None if len(wanted) == len(ids) and not watched else self._tensor(_integers(wanted)),
            attention=attention,
        )
        return batch, done, watched

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _groups(self, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[DecodeGroup]:
        """Decoding sequences, the longest first, cut where padding to the longest would cost more than a group of its own, and
        before they gather more than is kept for that."""
        groups: list[DecodeGroup] = []
        widths = [BlockManager.needed(length) for length in lengths.tolist()]
        start = 0
        while start < len(widths):
            width = widths[start]
            waste, end = 0, start + 1
            last = min(len(widths), start + max(1, self._most_blocks // width))
            while end < last:
                waste += width - widths[end]
                if waste > self._most_waste:
                    break
                end += 1
            tables = self._blocks.tables[rows[start:end], :width].reshape(-1)
            run = _run(tables) if end == start + 1 else -1
            groups.append(DecodeGroup(start, end, width, self._tensor(tables), lengths[start:end], run))
            start = end
        return groups


def _integers(numbers: list[int]) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def _run(blocks: NDArray[np.int64]) -> int:
    """The first block where all lie in order, else -1."""
    return int(blocks[0]) if bool((np.diff(blocks) == 1).all()) else -1

"""Runners: they turn a step's plan into the tensors of one flat batch, and that into logits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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

    def forward(self, plan: Plan) -> tuple[Tensor, list[Sequence]]:
        """Logits [rows, vocabulary] of the last token of each sequence whose tokens are all computed, and these sequences; then
        those of the last token of chunks that others wait for (``watched``), and their sequences.

        Marks the plan's tokens as cached. Nothing is marked when the model raises.
        """
        batch, done = self._batch(plan)
        with self._within:
            logits = self._compute(batch)
        for sequence in plan.decodes:
            sequence.cached += 1
        for sequence, size in plan.prefills:
            sequence.cached += size
        return logits, done

    def _await_layer(self, layer: int) -> None:
        """Return once a layer is there, as `AwaitLayer` does; the wait is counted."""
        began_s = time.monotonic()
        try:
            self._await(layer)
        finally:
            self.waited_s += time.monotonic() - began_s

    def _batch(self, plan: Plan) -> tuple[StepBatch, list[Sequence]]:
        decodes = plan.decodes
        if len(decodes) > 1:
            decodes.sort(key=_length, reverse=True)
        ids = [sequence.tokens[-1] for sequence in decodes]
        positions = [sequence.cached for sequence in decodes]
        rows = [sequence.row for sequence in decodes]
        wanted = list(range(len(decodes)))
        done = list(decodes)
        prefills: list[Prefill] = []
        watched: list[tuple[int, Sequence]] = []
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
                watched.append((len(ids) - 1, sequence))
        wanted += [row for row, _ in watched]
        done += [sequence for _, sequence in watched]
        at = np.asarray(positions, dtype=np.int64)
        slots = self._blocks.tables[rows, at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
        attention = AttentionBatch(self._pool, self._tensor(slots), self._groups(decodes, positions, rows), prefills)
        batch = StepBatch(
            ids=self._tensor(np.asarray(ids, dtype=np.int64)),
            positions=self._tensor(at),
            last_position=max(positions),
            wanted=None if len(wanted) == len(ids) and not watched else self._tensor(np.asarray(wanted, dtype=np.int64)),
            attention=attention,
        )
        return batch, done

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _groups(self, decodes: list[Sequence], positions: list[int], rows: list[int]) -> list[DecodeGroup]:
        """Decoding sequences, the longest first, cut where padding to the longest would cost more than a group of its own, and
        before they gather more than is kept for that."""
        groups: list[DecodeGroup] = []
        start = 0
        while start < len(decodes):
            width = BlockManager.needed(positions[start] + 1)
            waste, end = 0, start + 1
            last = min(len(decodes), start + max(1, self._most_blocks // width))
            while end < last:
                waste += width - BlockManager.needed(positions[end] + 1)
                if waste > self._most_waste:
                    break
                end += 1
            tables = self._blocks.tables[rows[start:end], :width].reshape(-1)
            run = _run(tables) if end == start + 1 else -1
            lengths = [position + 1 for position in positions[start:end]]
            groups.append(DecodeGroup(start, end, width, self._tensor(tables), lengths, run))
            start = end
        return groups


def _run(blocks: NDArray[np.int64]) -> int:
    """The first block where all lie in order, else -1."""
    return int(blocks[0]) if bool((np.diff(blocks) == 1).all()) else -1


def _length(sequence: Sequence) -> int:
    return sequence.cached

"""One forward pass of a transformers model over a step's tokens, flattened to one row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from agent.engine.attention import AttentionBatch, DecodeGroup, KvPool, Prefill, attending
from agent.engine.blocks import BLOCK_TOKENS, BlockManager
from agent.engine.scheduler import Plan
from agent.engine.sequence import Sequence

__all__ = ["ModelRunner"]

_GROUP_BLOCKS = 16


class ModelRunner:
    """Turns a plan into tensors and logits. ``model`` takes flattened input ids, position ids and ``logits_to_keep``."""

    def __init__(self, model: nn.Module, pool: KvPool, blocks: BlockManager, device: str) -> None:
        self._model = model
        self._pool = pool
        self._blocks = blocks
        self._device = torch.device(device)
        self.attended_layers: list[int] = []

    def forward(self, plan: Plan) -> tuple[Tensor, list[Sequence]]:
        """Logits [rows, vocabulary] of the last token of each sequence whose tokens are all computed, and these sequences.

        Marks the plan's tokens as cached. Nothing is marked when the model raises.
        """
        decodes = plan.decodes
        if len(decodes) > 1:
            decodes.sort(key=_length, reverse=True)
        ids = [sequence.tokens[-1] for sequence in decodes]
        positions = [sequence.cached for sequence in decodes]
        rows = [sequence.row for sequence in decodes]
        wanted = list(range(len(decodes)))
        done = list(decodes)
        prefills: list[Prefill] = []
        for sequence, size in plan.prefills:
            first, last = sequence.cached, sequence.cached + size
            prefills.append(Prefill(len(ids), len(ids) + size, first, self._held(sequence, last) if first else None))
            ids += sequence.tokens[first:last]
            positions += range(first, last)
            rows += [sequence.row] * size
            if last == len(sequence.tokens):
                wanted.append(len(ids) - 1)
                done.append(sequence)
        at = np.asarray(positions, dtype=np.int64)
        slots = self._blocks.tables[rows, at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
        batch = AttentionBatch(self._pool, self._tensor(slots), self._groups(decodes, rows), prefills)
        everything = len(wanted) == len(ids)
        with attending(batch):
            output = self._model(
                input_ids=self._tensor(np.asarray(ids, dtype=np.int64)).unsqueeze(0),
                position_ids=self._tensor(at).unsqueeze(0),
                use_cache=False,
                logits_to_keep=0 if everything else self._tensor(np.asarray(wanted, dtype=np.int64)),
            )
        self.attended_layers = batch.layers
        for sequence in decodes:
            sequence.cached += 1
        for sequence, size in plan.prefills:
            sequence.cached += size
        logits: Tensor = output.logits[0]
        return logits, done

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _held(self, sequence: Sequence, tokens: int) -> Tensor:
        return self._tensor(self._blocks.tables[sequence.row, : -(-tokens // BLOCK_TOKENS)].copy())

    def _groups(self, decodes: list[Sequence], rows: list[int]) -> list[DecodeGroup]:
        """Decoding sequences, the longest first, cut where padding to the longest would more than double the reading."""
        groups: list[DecodeGroup] = []
        start = 0
        while start < len(decodes):
            width = len(decodes[start].blocks)
            end = start + 1
            while end < len(decodes) and (width <= _GROUP_BLOCKS or len(decodes[end].blocks) * 2 > width):
                end += 1
            tables = self._blocks.tables[rows[start:end], :width]
            lengths = np.asarray([sequence.cached + 1 for sequence in decodes[start:end]], dtype=np.int64)
            groups.append(DecodeGroup(start, end, self._tensor(tables.reshape(-1)), self._tensor(lengths)))
            start = end
        return groups


def _length(sequence: Sequence) -> int:
    return sequence.cached

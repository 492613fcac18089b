"""What requests ask of their logits before a token is drawn: biases, penalties, and no end yet.

All rows that ask are changed together, by their places in the flattened logits; no two changes of a kind meet in one place, so
a row's outcome is the same in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agent.engine.counts import TokenCounts
from schema.sampling import SamplingParams

__all__ = ["Row", "adjusted"]


class Row(Protocol):
    """What must be known of the sequence behind a row of logits. ``plain``: it asks for none of what is done here."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def choice(self) -> int: ...

    @property
    def position(self) -> int: ...

    @property
    def plain(self) -> bool: ...

    @property
    def counts(self) -> TokenCounts: ...


def adjusted(logits: Tensor, rows: Rows[Row]) -> Tensor:
    """The logits [rows, vocabulary] as requests want them, in float32 where anybody asks; ``logits`` may be written to.

    Order: bias, repetition, frequency and presence, and stop tokens that come too early.
    """
    asking = [(index * logits.shape[1], row) for index, row in enumerate(rows) if not row.plain]
    if not asking:
        return logits
    logits = logits.float().contiguous()
    flat = logits.view(-1)
    _bias(flat, asking)
    _penalise(flat, asking)
    early = [
        start + token
        for start, row in asking
        if row.position < row.params.min_tokens
        for token in set(row.params.stop_token_ids)
    ]
    if early:
        flat.index_fill_(0, torch.tensor(early, device=flat.device), -math.inf)
    return logits


def _bias(flat: Tensor, asking: list[tuple[int, Row]]) -> None:
    biased = [(start + token, bias) for start, row in asking for token, bias in row.params.logit_bias]
    if biased:
        places, biases = zip(*biased, strict=True)
        flat.index_add_(0, torch.tensor(places, device=flat.device), torch.tensor(biases, device=flat.device))


def _penalise(flat: Tensor, asking: list[tuple[int, Row]]) -> None:
    """Repetition as in Keskar et al., "CTRL" (2019); frequency and presence as OpenAI's API defines them."""
    places: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float32]] = []
    takes: list[NDArray[np.float32]] = []
    for start, row in asking:
        params = row.params
        if not params.penalised:
            continue
        counts = row.counts
        places.append(counts.ids + start)
        factors.append(np.full(len(counts.ids), params.repetition_penalty, dtype=np.float32))
        times = counts.times
        takes.append((times * params.frequency_penalty + (times > 0) * params.presence_penalty).astype(np.float32))
    if not places:
        return
    at, factor, take = (torch.from_numpy(np.concatenate(parts)).to(flat.device) for parts in (places, factors, takes))
    values = flat.index_select(0, at)
    values = torch.where(values > 0, values / factor, values * factor) - take
    flat.index_copy_(0, at, values)

"""Log-probabilities of a step: of the tokens that were drawn, and of the most probable ones, for the rows that ask."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Final

import numpy as np
import torch
from torch import Tensor

from agent.engine.adjust import Row
from schema.memory import SAMPLED_AT_ONCE
from schema.sampling import MAX_LOGPROBS

__all__ = ["LogprobTable"]

_RECORD: Final = np.dtype([("id", "<i4"), ("logprob", "<f4")])
_LEAST: Final = -9999.0
"""In place of less, down to minus infinity, which JSON does not have."""


class LogprobTable:
    """The model's own distribution: make it before anybody's wishes change the logits [rows, vocabulary].

    Sums are in float64 and rounded to float32, so that their order decides nothing; the most probable tokens are always the
    same search, however many of them a row wants, so that a row's answer is the same in any batch.
    """

    def __init__(self, logits: Tensor, rows: Rows[Row]) -> None:
        self._wanted = {index: count for index, row in enumerate(rows) if (count := row.params.logprobs) is not None}
        if not self._wanted:
            return
        part = logits.index_select(0, torch.tensor(list(self._wanted), device=logits.device))
        size = max(1, SAMPLED_AT_ONCE // part.shape[1])
        self._logprobs = torch.cat([_log_softmax(part[at : at + size]) for at in range(0, len(part), size)])
        self._top = self._logprobs.topk(min(MAX_LOGPROBS, part.shape[1]), dim=1)

    def records(self, tokens: list[int]) -> dict[int, bytes]:
        """By row that asked: its token's record (`schema.sampling.read_logprobs`)."""
        if not self._wanted:
            return {}
        drawn = torch.tensor([max(0, tokens[index]) for index in self._wanted], device=self._logprobs.device).unsqueeze(1)
        ids = torch.cat((drawn, self._top.indices), dim=1)
        table = np.empty(tuple(ids.shape), dtype=_RECORD)
        table["id"] = ids.cpu().numpy()
        table["logprob"] = torch.cat((self._logprobs.gather(1, drawn), self._top.values), dim=1).cpu().numpy()
        return {index: table[at, : 1 + count].tobytes() for at, (index, count) in enumerate(self._wanted.items())}


def _log_softmax(logits: Tensor) -> Tensor:
    wide = logits.double()
    return wide.sub_(wide.logsumexp(dim=1, keepdim=True)).float().clamp_min_(_LEAST)

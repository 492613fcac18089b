"""Drawing the next tokens: greedy, or Gumbel-max under noise keyed by (seed, choice, position, token).

A row's outcome depends on nothing but its own logits, parameters and position: not on the batch, not on which tokens noise
was computed for. The maximum of ``logit / temperature + g`` over tokens, g standard Gumbel, is a draw from the softmax (Gumbel
1954; Maddison et al., "A* Sampling", 2014). Noise is float64, where the last bits of a vectorised logarithm decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import Final

import torch
from torch import Tensor

from agent.engine.adjust import Row, adjusted
from agent.engine.philox import philox4x32
from schema.memory import SAMPLED_AT_ONCE

__all__ = ["BROKEN", "NOISE_RANGE", "gumbel", "sample"]

BROKEN: Final = -1
"""In place of a token id: this row's logits are not numbers."""

NOISE_RANGE: Final = -math.log(-math.log1p(-(2.0**-33))) + math.log(-math.log(2.0**-33))
"""The greatest difference between two values of `gumbel`: a token further below the best one can never win."""

_NUCLEUS_FIRST: Final = 1024
_WORD = 0xFFFFFFFF


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, from uniform 32-bit words held in int64."""
    return (words.to(torch.float64).add_(0.5).mul_(2.0**-32)).log_().neg_().log_().neg_()


def sample(logits: Tensor, rows: Rows[Row]) -> list[int]:
    """The next token of each row of ``logits`` [rows, vocabulary], or BROKEN; ``logits`` may be written to."""
    logits = adjusted(logits, rows).float()
    best, tokens = _greatest(logits)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        size = max(1, SAMPLED_AT_ONCE // logits.shape[1])
        for start in range(0, len(drawn), size):
            part = drawn[start : start + size]
            everything = len(part) == len(rows)
            chosen = torch.tensor(part, device=logits.device)
            part_logits = logits if everything else logits.index_select(0, chosen)
            part_best = best if everything else best.index_select(0, chosen)
            tokens.index_copy_(0, chosen, _draw(part_logits, part_best.to(torch.float64), [rows[i] for i in part]))
    found = zip(best.tolist(), tokens.tolist(), strict=True)
    return [token if math.isfinite(logit) else BROKEN for logit, token in found]


def _greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row, not a number where any is not, and its token, the first of equals."""
    if logits.device.type != "cpu":
        best, tokens = logits.max(dim=1)
        return best, tokens
    tokens = torch.from_numpy(logits.numpy().argmax(axis=1))  # five times as fast as torch's own search
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1), tokens


def _draw(logits: Tensor, best: Tensor, rows: Rows[Row]) -> Tensor:
    """A draw for each row of float32 ``logits``; ``best`` is each row's maximum in float64."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64, device=device)
    reach = torch.tensor([_reach(row.params.min_p) for row in rows], dtype=torch.float64, device=device)
    floor = (best - reach * temperature).to(torch.float32)
    top_k = [min(row.params.top_k, logits.shape[1]) for row in rows]
    if any(top_k):
        floor = _raise_to_top_k(logits, floor, top_k)
    if any(row.params.top_p < 1 for row in rows):
        floor = _raise_to_nucleus(logits, floor, best, temperature, rows)
    kept = logits >= floor.unsqueeze(1)
    counts = kept.sum(dim=1)
    width = int(counts.max())
    keys = torch.tensor(
        [[row.params.seed & _WORD, row.params.seed >> 32, row.position & _WORD, row.choice & _WORD] for row in rows],
        device=device,
    ).unsqueeze(2)
    if width * 4 > logits.shape[1]:
        scores = (logits.to(torch.float64) - best.unsqueeze(1)).div_(temperature.unsqueeze(1))
        scores.add_(_dense_noise(keys, logits.shape[1])).masked_fill_(~kept, -math.inf)
        return scores.argmax(dim=1)
    row_index, token_index = kept.nonzero(as_tuple=True)
    column = torch.arange(row_index.shape[0], device=device) - (counts.cumsum(0) - counts).index_select(0, row_index)
    ids = torch.zeros((len(rows), max(width, 1)), dtype=torch.int64, device=device)
    ids.index_put_((row_index, column), token_index)
    scores = (logits.gather(1, ids).to(torch.float64) - best.unsqueeze(1)).div_(temperature.unsqueeze(1))
    scores.add_(_sparse_noise(keys, ids))
    scores.masked_fill_(torch.arange(ids.shape[1], device=device) >= counts.unsqueeze(1), -math.inf)
    return ids.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)


def _reach(min_p: float) -> float:
    """How far below the best logit, in units of the temperature, a token may lie: min_p is a share of its probability."""
    return min(NOISE_RANGE, -math.log(min_p)) if min_p else NOISE_RANGE


def _raise_to_top_k(logits: Tensor, floor: Tensor, top_k: list[int]) -> Tensor:
    """Each row's floor, at least its k-th greatest logit; equals of the k-th stay, so that no sort's order matters."""
    values = logits.topk(max(top_k), dim=1).values
    k = torch.tensor(top_k, device=logits.device)
    kth = values.gather(1, (k - 1).clamp_min_(0).unsqueeze(1)).squeeze(1)
    return torch.where(k > 0, torch.maximum(floor, kth), floor)


def _raise_to_nucleus(logits: Tensor, floor: Tensor, best: Tensor, temperature: Tensor, rows: Rows[Row]) -> Tensor:
    """Each row's floor, at least the logit at which the greatest probabilities reach top_p of what lies above the floor."""
    chosen = torch.tensor([index for index, row in enumerate(rows) if row.params.top_p < 1], device=logits.device)
    share = torch.tensor([row.params.top_p for row in rows if row.params.top_p < 1], dtype=torch.float64, device=logits.device)
    part = logits.index_select(0, chosen)
    part_floor = floor.index_select(0, chosen)
    part_best, part_temperature = (t.index_select(0, chosen).unsqueeze(1) for t in (best, temperature))
    wanted = _weights(part, part_floor, part_best, part_temperature).sum(dim=1).mul_(share)
    for size in (min(_NUCLEUS_FIRST, part.shape[1]), part.shape[1]):
        values = part.topk(size, dim=1).values
        weights = _weights(values, part_floor, part_best, part_temperature)
        before = weights.cumsum(dim=1).sub_(weights)
        inside = (before < wanted.unsqueeze(1)) & (weights > 0)
        if not bool(inside[:, -1].any()):
            break
    last = (inside.sum(dim=1) - 1).clamp_min_(0)
    cut = values.gather(1, last.unsqueeze(1)).squeeze(1)
    return floor.index_copy(0, chosen, torch.maximum(part_floor, cut))


def _weights(logits: Tensor, floor: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities up to a factor, float64; 0 below the floor."""
    weights = (logits.to(torch.float64) - best).div_(temperature).exp_()
    return weights.masked_fill_(logits < floor.unsqueeze(1), 0.0)


def _dense_noise(keys: Tensor, vocabulary: int) -> Tensor:
    """Noise for every token, [rows, vocabulary]; four tokens share one counter."""
    low, high, position, choice = keys.unbind(1)
    blocks = torch.arange(-(-vocabulary // 4), device=keys.device).unsqueeze(0)
    words = philox4x32(position, blocks, choice, torch.zeros_like(position), low, high)
    return gumbel(torch.stack(words, dim=2).flatten(1)[:, :vocabulary])


def _sparse_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Noise for the tokens ``ids`` [rows, candidates], equal to the dense noise at those tokens."""
    low, high, position, choice = keys.unbind(1)
    words = philox4x32(position, ids >> 2, choice, torch.zeros_like(position), low, high)
    return gumbel(torch.stack(words, dim=2).gather(2, (ids & 3).unsqueeze(2)).squeeze(2))

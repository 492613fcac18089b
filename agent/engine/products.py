"""Products of activations with weights, each by the way that is fastest on the processor at hand.

torch takes tokens as rows, x W^T. On CPUs three other ways to the same sums are often faster (measured by bench/products.py):

- **few**. Code of our own (`agent.native.few_tokens`) multiplies some dozens of tokens by 16-bit weights as they lie, nearly at
  the speed of memory. torch lays weights out anew for each product.
- **columns**, W x^T. In 16-bit floats 1.3 to 1.5 times as fast up to some dozens of tokens on a processor with AMX; on one that
  computes with them without it, only from 16 tokens on, half as fast at one. With AVX2 alone up to twice as fast in float32,
  and by a quarter faster than our own code for one token of 16-bit floats.
- **widened**. A processor that does not compute with 16-bit floats multiplies by such weights token by token. There weights are
  made float32, a tile at a time that stays in the cache, and multiplied as columns: four times as fast at 32 tokens, eight
  times in a prefill.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from agent.native import few_tokens
from agent.native.few_tokens import Way
from schema.errors import InvalidCheckpoint

__all__ = ["ROWS", "Product", "Ways", "few", "is_widened", "lies_for_few", "ways_of", "widened"]

_TILE_BYTES: Final = 8 << 20
"""Of weights made float32 at once: small enough for the cache, large enough that threads seldom meet."""


@dataclass(frozen=True, slots=True)
class Ways:
    """So many tokens as ``few`` has go the compiled ``way``, so many as ``columns`` has as columns, from ``widened`` on they go
    widened, all others as rows; and so do all by weights of fewer than ``least`` numbers, for which turning the tokens costs
    more than it saves."""

    columns: range = range(0)
    widened: int = sys.maxsize
    least: int = 0
    few: range = range(0)
    way: Way | None = None


ROWS: Final = Ways()
_FEW: Final = range(1, 33)
_FEW_BUT_ONE: Final = range(2, 33)
_TILES: Final = Ways(columns=range(1, 65))
_NATIVE: Final = Ways(columns=range(16, 65))
_WIDENED: Final = Ways(columns=range(1, 2), widened=9)
_SINGLE: Final = Ways(columns=range(1, 129), least=1 << 20)


@cache
def ways_of(dtype: torch.dtype, device: torch.device) -> Ways:
    """The fastest on this processor, by what torch says of it."""
    if device.type != "cpu":
        return ROWS
    if dtype == torch.float32:
        return _SINGLE if torch.backends.cpu.get_cpu_capability() == "AVX2" else ROWS
    if dtype not in (torch.bfloat16, torch.float16):
        return ROWS
    ways = few_tokens.ways()
    if is_widened(dtype, device):
        way = Way.BFLOAT16 if dtype == torch.bfloat16 else Way.FLOAT16
        return replace(_WIDENED, few=_FEW_BUT_ONE, way=way) if way in ways else _WIDENED
    if torch.cpu._is_amx_tile_supported():
        return _TILES
    if dtype == torch.bfloat16 and Way.DOT in ways:
        return replace(_NATIVE, few=_FEW, way=Way.DOT)
    if dtype == torch.bfloat16 and Way.BFLOAT16 in ways:
        return replace(_NATIVE, few=_FEW_BUT_ONE, way=Way.BFLOAT16)
    return _NATIVE


def is_widened(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor lacks what computes with 16-bit floats of that kind."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


class Product:
    """x W^T + b. Several ``weights`` [outputs, inputs] stand for one with their rows behind one another."""

    __slots__ = ("bias", "few", "ways", "weights")

    def __init__(self, weights: tuple[Tensor, ...], bias: Tensor | None, ways: Ways) -> None:
        self.weights = weights
        self.bias = bias
        self.ways = ways if sum(weight.numel() for weight in weights) >= ways.least else ROWS
        self.few = self.ways.few if all(lies_for_few(weight) for weight in weights) else range(0)

    def as_columns(self, tokens: int) -> bool:
        """Whether so many tokens are best left as columns from one product to the next."""
        return tokens not in self.few and (tokens in self.ways.columns or tokens >= self.ways.widened)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, outputs] of [tokens, inputs]."""
        if self.as_columns(x.shape[0]):
            return self.columns(x.t()).t().contiguous()
        if x.shape[0] in self.few:
            out = few(self.ways.way, self.weights, x)
        else:
            out = _joined([linear(x, weight) for weight in self.weights], dim=1)
        return out if self.bias is None else out.add_(self.bias)

    def columns(self, x: Tensor) -> Tensor:
        """[outputs, tokens] of [inputs, tokens]."""
        tokens = x.shape[1]
        if tokens >= self.ways.widened:
            out = widened(self.weights, x)
        elif tokens == 1:
            out = _joined([torch.mv(weight, x[:, 0]).unsqueeze(1) for weight in self.weights])
        else:
            if x.dtype == torch.float32:  # by few columns that lie as rows, MKL multiplies four times as slowly
                x = x.t().contiguous().t()
            out = _joined([torch.mm(weight, x) for weight in self.weights])
        return out if self.bias is None else out.add_(self.bias.unsqueeze(1))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual += x W^T + b, of one weight."""
        if self.as_columns(x.shape[0]):
            residual.add_(self.columns(x.t()).t())
            return
        if self.bias is not None:
            residual.add_(self.bias)
        if x.shape[0] in self.few:
            few(self.ways.way, self.weights, x, residual)
        else:
            residual.addmm_(x, self.weights[0].t())


def lies_for_few(weight: Tensor) -> bool:
    """Whether `few` can multiply by this weight, where the processor has a way to."""
    inputs = weight.shape[1]
    return weight.is_contiguous() and inputs > 0 and not inputs % few_tokens.STEP


def few(way: Way | None, weights: Sequence[Tensor], x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x W^T by weights that `lies_for_few` accepts, [tokens, outputs] of [tokens, inputs]; added to ``residual``, in place,
    where that is given. A token's bits depend on nothing but that token.

    Raises InvalidCheckpoint where tokens and weights do not fit: addresses are all that is handed on, and know no end.
    """
    assert way is not None
    for weight in weights:
        if (weight.shape[1], weight.dtype) != (x.shape[1], x.dtype):
            raise InvalidCheckpoint(
                f"the model multiplies {x.shape[1]} numbers of {x.dtype} by weights for {weight.shape[1]} of {weight.dtype}"
            )
    given = (x if way is Way.DOT else x.float()).contiguous()
    shape = (x.shape[0], sum(weight.shape[0] for weight in weights))
    out = x.new_empty(shape) if residual is None else residual
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (shape, x.dtype)
    stride, at = out.shape[1], out.data_ptr()
    for weight in weights:
        outputs, inputs = weight.shape
        few_tokens.multiply(
            way, weight.data_ptr(), outputs, inputs, given.data_ptr(), x.shape[0], at, stride,
            adds=residual is not None, threads=torch.get_num_threads(),
        )  # fmt: skip
        at += outputs * out.itemsize
    return out


def widened(weights: Sequence[Tensor], x: Tensor, at_once: int = 0) -> Tensor:
    """W x in float32, rounded to x's type at the end: [outputs, tokens] of [inputs, tokens].

    ``at_once``: so many tokens in every single product, of which the tokens must be a multiple; 0 for all.
    """
    inputs, tokens = x.shape
    at_once = at_once or max(1, tokens)
    wide = x.t().to(torch.float32, memory_format=torch.contiguous_format).t()
    out = x.new_empty((sum(weight.shape[0] for weight in weights), tokens))
    scratch = _scratch.of(max(_TILE_BYTES // torch.float32.itemsize, inputs))
    height = scratch.shape[0] // inputs
    row = 0
    for weight in weights:
        for part in torch.split(weight, height):
            tile = scratch[: part.numel()].view(part.shape).copy_(part)
            end = row + part.shape[0]
            for start in range(0, tokens, at_once):
                out[row:end, start : start + at_once] = torch.mm(tile, wide[:, start : start + at_once])
            row = end
    return out


class _Scratch(threading.local):
    """A thread's memory for tiles: fresh pages would cost more than the product."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, count: int) -> Tensor:
        if self._memory.shape[0] < count:
            self._memory = torch.empty(count)
        return self._memory


_scratch: Final = _Scratch()


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

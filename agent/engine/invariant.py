"""Deterministic models: within `RowInvariant`, a token's bits depend on nothing but that token's own row.

Two things break that in torch. A matrix product sums in an order that its number of rows decides: so products run the way of
few tokens, whose order is always the same (`products.few`), or, where the processor has none, in tiles of always 32 rows, the
last one padded. And a vectorised exponential rounds otherwise than the scalar one that serves the end of
an array, which is another row's end with every batch: so functions of that kind run on one row at a time. What is exact in
each element or reduces each row by itself passes through; what is not known to do so is refused by its name. Attention sees
to itself (`attention_paged`, or `attention_alone` where that is not compiled). That equals are equal holds for one kind of
device and one number of threads, where our own code is compiled on all nodes or on none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from agent.engine.products import few, is_widened, lies_for_few, ways_of, widened
from schema.errors import InvalidCheckpoint

__all__ = ["TILE_ROWS", "RowInvariant"]

TILE_ROWS: Final = 32


class RowInvariant(TorchFunctionMode):
    """A context in which models compute; raises InvalidCheckpoint for a torch function that is not known to be invariant."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.__name__
        named = kwargs or {}
        if name in _PASSED:
            return function(*args, **named)
        instead = _INSTEAD.get(name)
        if instead is None:
            raise InvalidCheckpoint(f"the model calls torch's {name!r}, of which it is not known that it treats each row alike")
        return instead(function, *args, **named)


def _tiled(rows: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of [rows, ...], in tiles of TILE_ROWS."""
    padded, count = _padded(rows), rows.shape[:-1].numel()
    parts = [product(padded[start : start + TILE_ROWS]) for start in range(0, count, TILE_ROWS)]
    whole = torch.cat(parts)[:count] if parts else product(padded)
    return whole.view(*rows.shape[:-1], whole.shape[-1])


def _padded(rows: Tensor) -> Tensor:
    """[rows, ...] with rows of zeros up to a multiple of TILE_ROWS."""
    flat = rows.reshape(-1, rows.shape[-1])
    padded = flat.new_zeros((-(-flat.shape[0] // TILE_ROWS) * TILE_ROWS, flat.shape[1]))
    padded[: flat.shape[0]] = flat
    return padded


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of [..., inputs] and [outputs, inputs]."""
    flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    way = ways_of(weight.dtype, weight.device).way
    if way is not None and flat.shape[0] and lies_for_few(weight):
        return few(way, (weight,), flat).view(shape)
    if is_widened(weight.dtype, weight.device):
        return widened((weight,), _padded(flat).t(), TILE_ROWS).t()[: flat.shape[0]].reshape(shape)
    return _tiled(x, lambda tile: linear(tile, weight))


def _linear(_: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = _product(x, weight)
    return out if bias is None else out + bias


def _addmm(_: Any, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight.t()) + bias


def _addmm_in_place(_: Any, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return residual.add_(_product(x, weight.t()))


def _matmul(function: Any, left: Tensor, right: Tensor) -> Any:
    """By a matrix of weights; or the outer product of positions and frequencies, in which nothing is summed."""
    if left.shape[-1] == 1:
        return function(left, right)
    if right.dim() != 2:
        raise InvalidCheckpoint("the model multiplies activations with each other outside of attention")
    return _product(left, right.t())


def _row_by_row(function: Any, x: Tensor, *args: Any, **named: Any) -> Tensor:
    """A function of each element of x, or of each row along the last dimension."""
    dim = named.get("dim", args[0] if args and function.__name__ == "softmax" else -1)
    if dim not in (-1, x.dim() - 1):
        raise InvalidCheckpoint(f"the model calls torch's {function.__name__!r} over another dimension than the last")
    if "dim" in named:
        named["dim"] = -1
    elif args and function.__name__ == "softmax":
        args = (-1, *args[1:])
    if x.dim() < 2 or not x.numel():
        return function(x, *args, **named)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1])
    return torch.stack([function(row, *args, **named) for row in rows.unbind(0)]).view(x.shape)


def _silu(function: Any, x: Tensor, inplace: bool = False) -> Tensor:
    out = _row_by_row(function, x)
    return x.copy_(out) if inplace else out


def _pow(function: Any, x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Tensor):  # powers of one number, as ALiBi's slopes are
        if isinstance(x, Tensor) and x.dim():
            raise InvalidCheckpoint("the model raises activations to powers that vary")
        return function(x, exponent)
    return x * x if exponent == 2 else _row_by_row(function, x, exponent)


def _rsqrt(function: Any, x: Tensor) -> Any:
    """Correctly rounded in float32; in half precision a vector of them is not what one alone is."""
    if x.dtype in (torch.float32, torch.float64):
        return function(x)
    out = _row_by_row(torch.rsqrt, x)
    return x.copy_(out) if function.__name__ == "rsqrt_" else out


def _add(function: Any, x: Any, other: Any, alpha: Any = 1) -> Any:
    """With a factor, vectors round once where a number alone is rounded twice."""
    return function(x, other if alpha == 1 else other * alpha)


def _addcmul(_: Any, x: Tensor, left: Tensor, right: Tensor, value: float = 1) -> Tensor:
    """Vectors round the sum of products once, where a number alone is rounded at each step."""
    return x + left * right * value


def _reduced(function: Any, x: Tensor, *args: Any, **named: Any) -> Any:
    """Over a row's own numbers: over another dimension they may be other tokens'."""
    name = function.__name__
    at = 1 if name in ("linalg_vector_norm", "topk") else 0
    dim = named.get("dim", args[at] if len(args) > at else -1 if name in ("sort", "topk") else None)
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    if x.is_floating_point() and not isinstance(dim, Tensor) and dim not in (-1, x.dim() - 1):
        raise InvalidCheckpoint(f"the model calls torch's {name!r} over another dimension than the last")
    return function(x, *args, **named)


def _cumsum(function: Any, x: Tensor, *args: Any, **named: Any) -> Any:
    if x.is_floating_point():
        raise InvalidCheckpoint("the model calls torch's 'cumsum', of which it is not known that it treats each row alike")
    return function(x, *args, **named)


_INSTEAD: Final[dict[str, Callable[..., Any]]] = {
    "linear": _linear, "addmm": _addmm, "addmm_": _addmm_in_place, "matmul": _matmul, "__matmul__": _matmul,
    "add": _add, "add_": _add, "sub": _add, "sub_": _add, "addcmul": _addcmul, "rsqrt": _rsqrt, "rsqrt_": _rsqrt,
    "cumsum": _cumsum, "silu": _silu, "pow": _pow, "__pow__": _pow,
    **dict.fromkeys(("argmax", "linalg_vector_norm", "max", "mean", "min", "sort", "sum", "topk"), _reduced),
    **dict.fromkeys(("cos", "exp", "expm1", "gelu", "log", "sigmoid", "sin", "softmax", "softplus", "tanh"), _row_by_row),
}  # fmt: skip
"""By name, what takes a function's place; it is handed the function and its arguments."""

_PASSED: Final = frozenset({
    # shapes, types, and what merely moves elements
    "__contains__", "__get__", "__getitem__", "__len__", "__setitem__", "_set_grad_enabled", "arange", "bfloat16", "bool",
    "broadcast_to", "cat", "chunk", "clone", "contiguous", "copy_", "detach", "dim", "dropout", "embedding", "empty",
    "empty_like", "expand", "expand_as", "flatten", "float", "full", "gather", "index_copy_", "index_select",
    "is_floating_point", "item", "long", "masked_fill", "masked_fill_", "narrow", "new_empty", "new_ones", "new_zeros",
    "nonzero", "numel", "one_hot", "ones", "ones_like", "permute", "repeat", "repeat_interleave", "reshape", "roll", "scatter",
    "scatter_", "size", "split", "squeeze", "stack", "stride", "t", "tensor", "to", "tolist", "transpose", "triu_", "type",
    "type_as", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros", "zeros_like",
    # correctly rounded in every element
    "__and__", "__bool__", "__eq__", "__floordiv__", "__invert__", "__ior__", "__or__", "__rdiv__", "__rsub__", "abs",
    "all", "any", "clamp", "div", "div_", "eq", "floor", "ge", "greater", "gt", "le", "lt", "maximum",
    "minimum", "mul", "mul_", "ne", "neg", "relu", "sqrt", "square", "square_",
    # each row by itself
    "layer_norm", "rms_norm",
    # one addition for each expert that a token goes to, in the experts' order
    "index_add_",
})  # fmt: skip

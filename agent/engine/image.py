"""A checkpoint's tensors over the memory of its image, without a copy, many of them in one call of torch.

A model's tensors are of few kinds, and those of a kind lie at equal distances, since layers are alike: all query matrices of
a model are one strided tensor, which torch takes apart at 0.8 us each, where making one alone takes 2 us.
"""

from __future__ import annotations

import gc
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from agent.engine.dtypes import PACKED, packed_shape, torch_dtype
from agent.store.index import TensorIndex

__all__ = ["Run", "equal_steps", "image_tensors"]

_PERIODS: Final = 16
"""Tensors of a kind within a layer, at most: experts, whose distances are equal within a layer too, have one or two."""
_TOGETHER: Final = 3
"""From so many on it is faster to take them out of one tensor."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` places, the first at ``first`` of a list, the next ones ``period`` further on each, that are ``step`` apart."""

    first: int
    period: int
    count: int
    step: int


def image_tensors(index: TensorIndex, image: Any) -> dict[str, Tensor]:
    """The stored tensors of a checkpoint by name, over ``image``: a readable buffer of its ``image_bytes``, which must outlive
    them, or a tensor of bytes on a device, which they keep alive.

    Nothing is copied but tensors that are not aligned to their elements; the memory may be read-only, so nobody may write to
    these tensors. About 1 us a tensor.
    """
    bases: dict[torch.dtype, Tensor] = {}
    made: list[Any] = [None] * len(index)
    order = np.lexsort((index.starts, index.kind_of))
    bounds = np.searchsorted(index.kind_of[order], np.arange(len(index.kinds) + 1)).tolist()
    # A view made while gradients are recorded remembers its base, which takes twice as long.
    with torch.no_grad(), _without_collections():
        for (name, shape), begin, end in zip(index.kinds, bounds, bounds[1:], strict=False):
            members, dtype = order[begin:end], torch_dtype(name)
            if dtype not in bases:
                bases[dtype] = _flat(image, dtype)
            views = _views(bases[dtype], packed_shape(name, shape) if name in PACKED else shape, index.starts[members])
            for place, view in zip(members.tolist(), views, strict=True):
                made[place] = view
    return dict(zip(index.names, made, strict=True))


def equal_steps(places: Any) -> list[Run]:
    """Ascending places (int64) as runs of equal steps: each in one run, those of each run further on in steps of a period."""
    count = len(places)
    period, breaks = 1, _breaks(places, 1)
    for candidate in range(2, min(_PERIODS, count - 1) + 1):
        if period * (len(breaks) + 1) * 32 <= count:
            break
        found = _breaks(places, candidate)
        if candidate * (len(found) + 1) < period * (len(breaks) + 1):
            period, breaks = candidate, found
    flat = places.tolist()
    runs: list[Run] = []
    first = at = 0
    while first < count:
        at = bisect_left(breaks, first + 1, at)
        end = min(count, (breaks[at] if at < len(breaks) else count) + period)
        for one in range(first, min(first + period, end)):
            length = len(range(one, end, period))
            runs.append(Run(one, period, length, flat[one + period] - flat[one] if length > 1 else 0))
        first = end
    return runs


def _breaks(places: Any, period: int) -> list[int]:
    """Where the distance to the place ``period`` further on is another than it was one before."""
    distances = places[period:] - places[:-period]
    found: list[int] = (np.nonzero(distances[1:] != distances[:-1])[0] + 1).tolist()
    return found


def _views(base: Tensor, shape: tuple[int, ...], starts: Any) -> list[Tensor]:
    """Tensors of this shape that start at these bytes, in ascending order."""
    item_bytes, stride = base.dtype.itemsize, _contiguous(shape)
    if (starts % item_bytes).any():  # of a file that is loaded in its place
        return [_view(base, shape, start) for start in starts.tolist()]
    places = starts // item_bytes
    flat = places.tolist()
    views: list[Any] = [None] * len(flat)
    for run in equal_steps(places):
        at = slice(run.first, run.first + run.period * (run.count - 1) + 1, run.period)
        if run.count >= _TOGETHER:
            views[at] = base.as_strided((run.count, *shape), (run.step, *stride), flat[run.first]).unbind()
        else:
            views[at] = [base.as_strided(shape, stride, place) for place in flat[at]]
    return views


def _view(base: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    item_bytes = base.dtype.itemsize
    if start % item_bytes == 0:
        return base.as_strided(shape, _contiguous(shape), start // item_bytes)
    return base.view(torch.uint8)[start : start + prod(shape) * item_bytes].clone().view(base.dtype).view(shape)


def _flat(image: Any, dtype: torch.dtype) -> Tensor:
    """The whole image as elements of this type."""
    if isinstance(image, Tensor):
        return image[: len(image) // dtype.itemsize * dtype.itemsize].view(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(image, dtype=dtype, count=len(image) // dtype.itemsize)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return tuple(strides)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Thousands of objects that all stay would have Python look for garbage among them, for a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

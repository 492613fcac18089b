"""Reads a view with strides, as a pickled tensor may be one, in the order of its elements: by reads alone, no mapping.

A file that is cut short under a mapping would end the process; a read says where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, Final

import numpy as np

__all__ = ["gather"]

_SPAN_BYTES: Final = 1 << 20
"""What is read at once of elements that do not follow each other."""

Array = np.ndarray[Any, Any]
_Counts = tuple[int, ...]


def gather(
    read: Callable[[int, memoryview], None], at: int, item: int, shape: _Counts, strides: _Counts, first: int, count: int
) -> memoryview:
    """The bytes of elements ``first`` to ``first + count`` of a view whose first element lies at byte ``at``.

    ``item`` is an element's size, strides are in elements. ``read`` fills memory from a byte on.
    """
    found: Array = np.empty(count, f"u{item}")
    done = 0
    for start, dimensions, steps in _boxes(shape, strides, first, count, 0):
        size = prod(dimensions)
        _read_box(read, at + start * item, found[done : done + size].reshape(dimensions), steps)
        done += size
    return found.view(np.uint8).data


def _boxes(shape: _Counts, strides: _Counts, first: int, count: int, offset: int) -> Iterator[tuple[int, _Counts, _Counts]]:
    """Such a range cut into boxes, in order: the offset of each, its dimensions, its strides."""
    if not count:
        return
    if not shape:
        yield offset, (), ()
        return
    inner = prod(shape[1:])
    (low, head), (high, tail) = divmod(first, inner), divmod(first + count, inner)

    def row(number: int, begin: int, end: int) -> Iterator[tuple[int, _Counts, _Counts]]:
        return _boxes(shape[1:], strides[1:], begin, end - begin, offset + number * strides[0])

    if low == high:
        yield from row(low, head, tail)
        return
    if head:
        yield from row(low, head, inner)
        low += 1
    if low < high:
        yield offset + low * strides[0], (high - low, *shape[1:]), strides
    yield from row(high, 0, tail)


def _read_box(read: Callable[[int, memoryview], None], at: int, target: Array, strides: Sequence[int]) -> None:
    """Fill a box: in long runs, the axes in the order in which they lie in the file."""
    item = target.itemsize
    # What has no extent, or repeats, is outermost; it is walked, never read as a run.
    order = sorted(
        range(target.ndim), key=lambda axis: -strides[axis] if strides[axis] and target.shape[axis] > 1 else -(1 << 62)
    )
    view = target.transpose(order)
    steps = [strides[axis] for axis in order]
    dense, outer = 1, target.ndim
    while outer and steps[outer - 1] == dense and view.shape[outer - 1] > 1:
        outer -= 1
        dense *= view.shape[outer]
    step = 1
    if outer == target.ndim and outer and view.shape[-1] > 1 and steps[-1]:
        outer -= 1
        dense, step = view.shape[outer], steps[outer]
    piece = dense if step == 1 else max(1, _SPAN_BYTES // (step * item))
    for index in np.ndindex(*view.shape[:outer]):
        start = at + item * sum(number * stride for number, stride in zip(index, steps, strict=False))
        run = view[index]
        for low in range(0, dense, piece):
            high = min(low + piece, dense)
            span = np.empty(((high - low - 1) * step + 1) * item, np.uint8)
            read(start + low * step * item, span.data)
            elements = span.view(target.dtype)[::step]
            if step == 1:
                view[index] = elements.reshape(run.shape)
            else:
                run[low:high] = elements

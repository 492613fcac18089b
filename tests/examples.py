"""How many examples a property, a sample or a sweep has: all where a change is accepted, fewer while one works on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["examples", "sampled"]


def examples(many: int) -> int:
    """So ``many`` in CI (`.ci/run` sets that variable); a quarter elsewhere, other ones in each run."""
    return many if os.environ.get("CI") else max(5, many // 4)


def sampled(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test that is done for many: those that are not among ``quick`` are slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]

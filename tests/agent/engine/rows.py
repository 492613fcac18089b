"""Rows of logits as the sampler sees them, without an engine."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from agent.engine.sequence import Sequence
from tests.agent.engine.models import submit_of

Row = Sequence


def row(position: int = 0, choice: int = 0, tokens: Items[int] | None = None, **params: Any) -> Row:
    """A sequence that has generated ``position`` tokens: the last of ``tokens``, which the others precede as its prompt.

    Without ``tokens`` it only says so.
    """
    known = list(tokens or [0])
    prompt = len(known) - position if tokens else 1
    made = Sequence(submit_of(1, known[:prompt], 100_000, known[prompt:], choice, **{"temperature": 1.0, **params}))
    made.position = position
    return made

"""How long sequences take to move to an instance that is there: rounds of computing what it lacks while the source goes on.

The target computes the sequences one after the other, one of t tokens in ``T(t) = a*t + b`` seconds. All of them go on at the
source meanwhile, each with a token in the time in which `_SHRINK` are computed anew (ServerlessLLM, OSDI 2024, section 5):
what a round has taken is the gap of the next one, of every sequence. So the gaps of few sequences shrink fast, and those of
many do not. The rounds end when no gap is above `_LAST_GAP_TOKENS`, when all gaps together are no longer less than nine
tenths of those before, or after `_MOST_ROUNDS`. Then the source lets go, and the last gaps are computed while the sequences
stand still: the k-th of n for k times that long.
"""

from __future__ import annotations

from collections.abc import Sequence

from sllmctl.planner.estimates import Estimates

__all__ = ["rounds_s"]

_LAST_GAP_TOKENS = 16
_SHRINK = 10
_MOST_ROUNDS = 6
_SHRUNK = 0.9
_FAR_TOKENS = 1_000_000


def rounds_s(estimates: Estimates, digest: str, kind: str, tokens: Sequence[int]) -> tuple[float, float]:
    """(until the last token has moved, how long a sequence stands still in the mean), for sequences of so many tokens on a
    target on devices of this kind."""
    count = len(tokens)
    base_s = estimates.migration_s(digest, kind, 0)
    token_s = (estimates.migration_s(digest, kind, _FAR_TOKENS) - base_s) / _FAR_TOKENS
    longest, whole, before = float(max(tokens)), float(sum(tokens)), float("inf")
    seconds = 0.0
    for _ in range(_MOST_ROUNDS):
        if longest <= _LAST_GAP_TOKENS or whole > _SHRUNK * before:
            break
        round_s = token_s * whole + count * base_s
        seconds += round_s
        before, longest = whole, round_s / (_SHRINK * token_s)
        whole = count * longest
    last_s = token_s * whole + count * base_s
    return seconds + last_s, last_s * (count + 1) / (2 * count)

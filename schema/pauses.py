"""Pauses between tries of what may go well later."""

from __future__ import annotations

__all__ = ["growing_pause_s"]


def growing_pause_s(first_s: float, longest_s: float, pauses: int) -> float:
    """How long to wait after so many ``pauses``: ``first_s``, then twice that, and so on up to ``longest_s``, for however long
    that goes on: a power of so many pauses would be beyond a float."""
    return min(longest_s, first_s * 2.0 ** min(pauses, 64))

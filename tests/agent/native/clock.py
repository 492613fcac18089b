"""The readers' clock in the hand of a test."""

from __future__ import annotations

import time

import pytest

from agent.native import ring_reader, threads

STALL_S = 1000.0
"""No machine stands still for so long: a read is overdue only where a test puts the clock forward."""


class Clock:
    """Goes as the real one does, and can be put forward: what is under way then is overdue, and nothing that begins later."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead_s = 0.0
        for module in (ring_reader, threads):
            monkeypatch.setattr(module, "time", self)
            monkeypatch.setattr(module, "_TICK_S", 0.05)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def forward(self) -> None:
        self._ahead_s += STALL_S

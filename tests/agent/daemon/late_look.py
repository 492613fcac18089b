"""Looks at the checkpoints on the disk that end when a test says so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent.store import catalog
from tests.agent.daemon.peers import WAIT_S

__all__ = ["look_held_back"]


def look_held_back(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """From now on every look waits: the first event says that one has begun, the second lets all go on."""
    begun, go, real = threading.Event(), threading.Event(), catalog.look

    def look(root: Path) -> catalog.Found:
        begun.set()
        assert go.wait(WAIT_S)
        return real(root)

    monkeypatch.setattr(catalog, "look", look)
    return begun, go

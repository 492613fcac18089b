"""A planner as the control loop sees it, what it is told that nodes can do, and what it may ask of the router.

All times are seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from sllmctl.cluster.plans import Decision
from sllmctl.cluster.records import Model

__all__ = [
    "Abilities",
    "Journals",
    "NoJournals",
    "Planner",
]


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What nodes and router can carry out. ``migrate``: running sequences move between instances by their tokens. ``fetch``: a
    node gets any checkpoint that it lacks, from a peer or a remote, when an instance is started. ``published``: it gets those
    that were published, from their remote."""

    migrate: bool = False
    fetch: bool = False
    published: bool = False


class Journals(Protocol):
    """What only the router knows, read at the moment of planning."""

    def tokens(self, instance: str) -> Sequence[int]:
        """Prompt and generated tokens of each sequence that runs on an instance."""

    def remaining_s(self, instance: str) -> float:
        """How long an instance that takes nothing new would go on, as far as its model's past replies tell."""

    def wait_s(self, model: str) -> float | None:
        """How long until the last of those who wait for a model would run on its ready instances; None if nothing tells."""


class NoJournals:
    """Journals of which nothing is known."""

    def tokens(self, instance: str) -> Sequence[int]:
        return ()

    def remaining_s(self, instance: str) -> float:
        return 0.0

    def wait_s(self, model: str) -> float | None:
        return None


class Planner(Protocol):
    """Who decides. It reads the view and changes nothing; the control loop carries its decisions out."""

    def plan(self, model: Model, now: float, *, wait_s: float | None = None) -> Decision:
        """Where one more instance of ``model`` goes. ``wait_s``: when those who wait would be served without it, if known."""

    def reload_s(self, model: Model, now: float) -> float:
        """How long a start of ``model`` would take when its idle instances and their KV caches are gone."""

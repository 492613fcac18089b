"""Pure functions over the cluster view: plans and their reasons. No I/O, no clock, no randomness."""

from __future__ import annotations

from sllmctl.planner.memory import context_tokens
from sllmctl.planner.place import Candidate, Plan, Refusal, Rejection, place
from sllmctl.planner.planner import LocalityPlanner, PlannerOptions
from sllmctl.planner.room import Eviction, make_room

__all__ = [
    "Candidate",
    "Eviction",
    "LocalityPlanner",
    "Plan",
    "PlannerOptions",
    "Refusal",
    "Rejection",
    "context_tokens",
    "make_room",
    "place",
]

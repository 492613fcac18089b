"""Pure functions over the cluster view: plans and their reasons. No I/O, no clock, no randomness."""

from __future__ import annotations

from sllmctl.cluster.plans import Candidate, Plan, Refusal, Rejection, Wait
from sllmctl.planner.memory import context_tokens
from sllmctl.planner.planner import LocalityPlanner, PlannerOptions

__all__ = [
    "Candidate",
    "LocalityPlanner",
    "Plan",
    "PlannerOptions",
    "Refusal",
    "Rejection",
    "Wait",
    "context_tokens",
]

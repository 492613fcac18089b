"""Pure functions over the cluster view: plans and their reasons. No I/O, no clock, no randomness."""

from __future__ import annotations

from sllmctl.planner.memory import context_tokens
from sllmctl.planner.place import Candidate, Plan, Refusal, Rejection, place

__all__ = ["Candidate", "Plan", "Refusal", "Rejection", "context_tokens", "place"]

"""The policies that are compared: who plans, and what an instance may be. All of them use the same loaders and links."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.plans import Abilities, Journals, Planner

__all__ = ["MakePlanner", "Policy"]

MakePlanner = Callable[[ClusterView, Estimates, Journals, ControlSettings, Abilities, Random], Planner]


@dataclass(frozen=True, slots=True)
class Policy:
    """``exclusive``: one model to a device, its KV cache taking what the weights leave. ``batching``: several sequences run on
    one instance; without, one. ``control``: settings of the control loop that belong to the policy."""

    name: str
    title: str
    make: MakePlanner
    abilities: Abilities = field(default_factory=Abilities)
    exclusive: bool = False
    batching: bool = True
    control: Mapping[str, float] = field(default_factory=dict)

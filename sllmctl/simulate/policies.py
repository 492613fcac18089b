"""The policies that are compared: who plans, and what an instance may be. All of them use the same loaders and links."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from schema.errors import InvalidInput
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities, Journals, Planner
from sllmctl.planner.planner import LocalityPlanner, PlannerOptions
from sllmctl.simulate.baselines import Preempting, RandomPlanner, Unwaiting

__all__ = ["POLICIES", "MakePlanner", "Policy", "policy_named"]

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


def policy_named(name: str) -> Policy:
    """Raises InvalidInput, naming those there are."""
    policy = POLICIES.get(name)
    if policy is None:
        raise InvalidInput(f"there is no policy {name!r}; those there are: {', '.join(POLICIES)}", "policies")
    return policy


def _random(*, sharing: bool) -> MakePlanner:
    def make(
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        random: Random,
    ) -> Planner:
        return RandomPlanner(view, estimates, journals, settings, abilities, random, sharing=sharing)

    return make


def _shepherd(*, sharing: bool) -> MakePlanner:
    def make(
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        random: Random,
    ) -> Planner:
        return Preempting(view, estimates, journals, settings, abilities, sharing=sharing)

    return make


def _paper(
    view: ClusterView, estimates: Estimates, journals: Journals, settings: ControlSettings, abilities: Abilities, random: Random
) -> Planner:
    return Unwaiting(LocalityPlanner(view, estimates, journals, settings, abilities, PlannerOptions(sharing=False)))


def _ours(*, locality: bool = True, sharing: bool = True) -> MakePlanner:
    def make(
        view: ClusterView,
        estimates: Estimates,
        journals: Journals,
        settings: ControlSettings,
        abilities: Abilities,
        random: Random,
    ) -> Planner:
        options = PlannerOptions(locality=locality, sharing=sharing)
        return LocalityPlanner(view, estimates, journals, settings, abilities, options)

    return make


_FETCH = Abilities(fetch=True)
_MIGRATE = Abilities(fetch=True, migrate=True)
_AT_ONCE = {"evict_idle_s": 0.0, "scale_up_after_s": 0.0, "prefetch_every_s": 0.0}
"""Every request that finds no room is placed at once, and nothing is read ahead of need. With the production keep-alive, which
is the better one for them."""
_AS_PUBLISHED = _AT_ONCE | {"keep_alive_per_reload": 1.0, "keep_alive_least_s": 0.0}
"""An idle instance is kept for as long as its load takes, unless its device is wanted sooner."""

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "random",
            "Serverless (random)",
            _random(sharing=False),
            _FETCH,
            exclusive=True,
            batching=False,
            control=_AS_PUBLISHED,
        ),
        Policy(
            "shepherd",
            "SHEPHERD* (preemption)",
            _shepherd(sharing=False),
            _FETCH,
            exclusive=True,
            batching=False,
            control=_AS_PUBLISHED,
        ),
        Policy("paper", "ServerlessLLM (paper)", _paper, _MIGRATE, exclusive=True, batching=False, control=_AS_PUBLISHED),
        Policy("random-batched", "random, batching and sharing", _random(sharing=True), _FETCH, control=_AT_ONCE),
        Policy("shepherd-batched", "SHEPHERD*, batching and sharing", _shepherd(sharing=True), _FETCH, control=_AT_ONCE),
        Policy("sllmctl", "sllmctl", _ours(), _MIGRATE),
        Policy("sllmctl-no-locality", "sllmctl without locality", _ours(locality=False), _MIGRATE),
        Policy("sllmctl-no-migration", "sllmctl without migration", _ours(), _FETCH),
        Policy("sllmctl-no-prefetch", "sllmctl without prefetch", _ours(), _MIGRATE, control={"prefetch_every_s": 0.0}),
        Policy("sllmctl-no-sharing", "sllmctl without sharing", _ours(sharing=False), _MIGRATE, exclusive=True),
    )
}
"""By name, in the order of the tables."""

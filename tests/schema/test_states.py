from enum import StrEnum

import pytest

from schema import states
from schema.states import InstanceState, ModelState, NodeState, RequestState, TierState, can_become

LIFECYCLES: list[type[StrEnum]] = [NodeState, TierState, ModelState, InstanceState, RequestState]


@pytest.mark.parametrize("kind", LIFECYCLES)
def test_every_state_has_a_place_in_its_diagram(kind: type[StrEnum]) -> None:
    for state in kind:
        assert not can_become(state, state)
        assert state.value in (kind.__doc__ or "")


@pytest.mark.parametrize("kind", LIFECYCLES)
def test_every_state_can_be_reached_from_the_first(kind: type[StrEnum]) -> None:
    members = list(kind)
    reached = {members[0]}
    while more := {new for old in reached for new in members if can_become(old, new)} - reached:
        reached |= more
    assert reached == set(members)


def test_a_stopped_instance_stays_stopped() -> None:
    assert not any(can_become(InstanceState.STOPPED, state) for state in InstanceState)


def test_exported_names_exist() -> None:
    assert all(hasattr(states, name) for name in states.__all__)

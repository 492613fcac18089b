"""Making room: what is taken is enough, is idle, and none of it is taken in vain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from schema.states import InstanceState
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import ClusterView, Instance, Model
from sllmctl.planner import Plan, Refusal, make_room, place
from tests.sllmctl.planner.test_place import clusters

RULES = ControlSettings(kv_least_tokens=2, kv_sequence_tokens=4, kv_sequences=2, evict_idle_s=1.0)
NOW = 100.0


@st.composite
def crowded(draw: st.DrawFn) -> tuple[ClusterView, Model]:
    """A cluster whose ready instances are idle for various times, some not at all."""
    view, model = draw(clusters())
    for instance in view.instances.values():
        if instance.state is InstanceState.READY:
            instance.idle_since = draw(st.sampled_from([None, NOW - 50, NOW - 2, NOW - 0.5]))
            instance.running = 0 if instance.idle_since is not None else 1
    return view, model


def without(view: ClusterView, gone: list[Instance]) -> None:
    for instance in gone:
        view.set_state(instance, InstanceState.STOPPED)
        view.drop_instance(instance)


@given(crowded(), st.data())
def test_what_is_taken_is_enough_and_none_of_it_in_vain(case: tuple[ClusterView, Model], data: st.DataObject) -> None:
    view, model = case
    before = place(view, model, RULES)
    eviction = make_room(view, model, NOW, RULES)
    if isinstance(before, Plan):
        assert eviction is not None
        assert eviction.instances == ()
        return
    if eviction is None:
        return
    taken = [view.instances[name] for name in eviction.instances]
    for one in taken:
        assert (one.state, one.running, one.node) == (InstanceState.READY, 0, eviction.node)
        assert one.idle_since is not None
        assert one.idle_since + RULES.evict_idle_s <= NOW
    spared = data.draw(st.sampled_from(taken)) if taken else None
    without(view, [one for one in taken if one is not spared])
    if spared is not None:
        assert isinstance(place(view, model, RULES), Refusal)
        without(view, [spared])
    assert isinstance(place(view, model, RULES), Plan)


@given(crowded())
def test_no_way_is_said_only_when_there_is_none(case: tuple[ClusterView, Model]) -> None:
    view, model = case
    if make_room(view, model, NOW, RULES) is None:
        idle = [one for one in view.instances.values() if one.idle_since is not None and one.idle_since + 1.0 <= NOW]
        without(view, idle)
        assert isinstance(place(view, model, RULES), Refusal)

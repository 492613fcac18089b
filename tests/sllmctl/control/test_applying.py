"""Models as files want them: all of it or nothing, told field by field, and the same again changes nothing."""

from __future__ import annotations

import msgspec
import pytest

from schema.admin import AppliedView, ChangeView
from schema.errors import Fault
from schema.link import Ingest
from schema.spec import EngineSpec, HubSource, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState
from sllmctl.control.events import AddModel, ApplyModels, RemoveModel, StopModel
from tests.sllmctl.control.world import World, spec

_replace = msgspec.structs.replace


def _apply(
    world: World, *specs: ModelSpec, remove: tuple[str, ...] = (), deploy: bool = True, dry_run: bool = False
) -> tuple[AppliedView, ...] | Fault:
    fault = world.ask(lambda ticket: ApplyModels(ticket, specs, remove, deploy, dry_run))
    if fault is not None:
        return fault
    assert isinstance(world.told, tuple)
    return world.told


def _actions(told: tuple[AppliedView, ...] | Fault) -> list[str]:
    assert isinstance(told, tuple)
    return [each.action for each in told]


def test_new_models_are_ingested_and_then_served(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    assert _actions(_apply(world, spec("a", least=1), spec("b"))) == ["created", "created"]
    assert [world.view.models[name].state for name in "ab"] == [ModelState.INGESTING] * 2
    assert _actions(_apply(world, spec("a", least=1), spec("b"))) == ["unchanged", "unchanged"]
    world.start_manager()
    world.connect("local")
    for op in list(agent.ops):
        world.tell("local", agent.finish(op))
    assert [world.view.models[name].state for name in "ab"] == [ModelState.DEPLOYED] * 2
    agent.automatic = True
    assert len(world.view.instances_of("a")) == 1
    assert not world.view.models["a"].deploy_next
    world.check_rows()


def test_what_is_stopped_before_it_was_served_is_not_served(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    _apply(world, spec("a"))
    assert world.ask(lambda ticket: StopModel(ticket, "a")) is None
    (op,) = agent.ops
    world.tell("local", agent.finish(op))
    assert world.view.models["a"].state is ModelState.STOPPED


def test_without_deploying_they_stay_as_they_are(world: World) -> None:
    _apply(world, spec("a"), deploy=False)
    assert world.view.models["a"].state is ModelState.STOPPED
    assert _actions(_apply(world, spec("a"), deploy=False)) == ["unchanged"]
    told = _apply(world, spec("a"))
    assert told == (
        AppliedView(name="a", action="configured", changes=(ChangeView(key="state", old="stopped", new="deployed"),)),
    )
    assert world.view.models["a"].state is ModelState.DEPLOYED
    world.ask(lambda ticket: StopModel(ticket, "a"))
    changed = _replace(spec("a"), cold_start_timeout_s=3.0)
    assert _actions(_apply(world, changed, deploy=False)) == ["configured"]
    assert world.view.models["a"].state is ModelState.STOPPED
    assert world.models["a"].spec == changed


def test_a_scale_is_changed_in_place(world: World) -> None:
    world.serve(spec(least=1, most=1))
    before = world.only()
    wider = _replace(spec(), scale=ScaleSpec(min=1, max=3, keep_alive_s=100.0, max_concurrency=9))
    told = _apply(world, wider)
    assert told == (
        AppliedView(
            name="m",
            action="configured",
            changes=(ChangeView(key="scale.max", old=1, new=3), ChangeView(key="scale.max_concurrency", old=4, new=9)),
        ),
    )
    assert (world.only(), world.only().state) == (before, InstanceState.READY)
    assert world.routes[before.id].max_concurrency == 9
    history = len(world.history)
    assert _actions(_apply(world, wider)) == ["unchanged"]
    assert [step.changes for _, _, step in world.history[history:]] == [[]]


def test_another_engine_makes_other_instances(world: World) -> None:
    world.serve(spec(least=1))
    before = world.only()
    told = _apply(world, _replace(spec(least=1), engine=EngineSpec(kv_bytes=20 << 20)))
    assert isinstance(told, tuple)
    assert (told[0].restarts, [each.key for each in told[0].changes]) == (1, ["engine.kv_bytes"])
    world.end_drained(before.id)
    world.pass_time(1)
    after = world.only()
    assert after.id != before.id
    assert (after.state, after.working_bytes) == (InstanceState.READY, 20 << 20)
    assert "Replaced" in world.reasons("instance")
    world.check_rows()


def test_a_dry_run_tells_it_all_and_changes_nothing(world: World) -> None:
    world.serve(spec("a", least=1))
    world.serve(spec("b"))
    history = len(world.history)
    told = _apply(
        world,
        _replace(spec("a", least=1), devices=2),
        spec("c"),
        _replace(spec("b"), source=HubSource("o/b")),
        remove=("nobody",),
        dry_run=True,
    )
    assert _actions(told) == ["configured", "created", "refused", "unchanged"]
    assert isinstance(told, tuple)
    assert told[0].restarts == 1
    assert told[1].changes[1] == ChangeView(key="source.path", old=None, new="/models/c")
    assert told[2].fault is not None
    assert told[2].key == "source.kind"
    assert "model b: source.kind: 'path' cannot become 'hub'" in told[2].fault.message
    assert [step.changes for _, _, step in world.history[history:]] == [[]]


def test_one_refusal_keeps_all_of_it_from_happening(world: World) -> None:
    world.serve(spec("a"))
    world.serve(spec("b"))
    history = len(world.history)
    refused = _apply(
        world,
        spec("new"),
        _replace(spec("a"), source=PathSource("/models/other")),
        spec("far", node="nowhere"),
        remove=("b",),
    )
    assert isinstance(refused, Fault)
    assert refused.code == "conflict"
    assert refused.message.split("\n")[1] == "model far: there is no node 'nowhere' to read the source on"
    assert set(world.view.models) == {"a", "b"}
    assert [step.changes for _, _, step in world.history[history:]] == [[]]


def test_the_managers_own_node_has_two_names(world: World) -> None:
    world.serve(spec())
    assert _actions(_apply(world, _replace(spec(), source=PathSource("/models/m", "local")))) == ["unchanged"]


def test_what_no_file_has_is_removed_if_it_is_named(world: World) -> None:
    world.serve(spec("a", least=1))
    world.serve(spec("b"))
    told = _apply(world, spec("b"), remove=("a",))
    assert _actions(told) == ["unchanged", "removed"]
    assert set(world.view.models) == {"b"}


def test_a_failed_ingest_is_tried_again_from_any_source(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    world.tell("local", agent.finish(op, Fault("invalid_checkpoint", "no config.json")))
    agent.automatic = True
    told = _apply(world, _replace(spec(), source=PathSource("/models/better")))
    assert isinstance(told, tuple)
    assert [each.key for each in told[0].changes] == ["source.path", "state"]
    asked = [one.source for one in agent.heard if isinstance(one, Ingest)]
    assert asked[-1] == PathSource("/models/better")
    assert world.view.models["m"].state is ModelState.DEPLOYED


@pytest.mark.parametrize(
    ("specs", "remove", "code"),
    [
        ((spec("a"), spec("a")), (), "invalid_input"),
        ((spec("a"),), ("a",), "invalid_input"),
        ((spec("a", least=2),), (), "invalid_input"),
    ],
)
def test_what_makes_no_sense_is_refused(world: World, specs: tuple[ModelSpec, ...], remove: tuple[str, ...], code: str) -> None:
    refused = _apply(world, *specs, remove=remove)
    assert isinstance(refused, Fault)
    assert refused.code == code
    assert not world.view.models


def test_a_model_that_is_going_is_not_taken_for_there(world: World) -> None:
    world.serve(spec(least=1))
    world.agents["local"].automatic = False
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    refused = _apply(world, spec(least=1))
    assert isinstance(refused, Fault)
    assert refused == Fault("conflict", "model m: it is being removed; wait until it is gone")

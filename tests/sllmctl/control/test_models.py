"""Models: registered, ingested, served, stopped, removed."""

from __future__ import annotations

import pytest

from schema.errors import Fault
from schema.link import CancelOperation, DropCheckpoint, Ingest, OperationDone, OperationsAcked, Placement, PlacementUpdate
from schema.spec import ScaleSpec
from schema.states import InstanceState, ModelState, Tier, TierState
from sllmctl.control.events import (
    AddModel,
    DemandChanged,
    DeployModel,
    EndOperation,
    FromNode,
    Operate,
    Pin,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from tests.sllmctl.control.conftest import MakeWorld
from tests.sllmctl.control.world import Agent, World, digest_of, spec


def test_add_ingests_and_waits_to_be_deployed(world: World) -> None:
    world.agents["local"].automatic = False
    assert world.ask(lambda ticket: AddModel(ticket, spec())) is None
    model = world.view.models["m"]
    (op,) = world.agents["local"].ops
    assert (model.state, model.op, model.node) == (ModelState.INGESTING, op, "local")
    world.tell("local", world.agents["local"].finish(op))
    assert (model.state, model.digest, model.op) == (ModelState.STOPPED, digest_of("m"), None)
    assert world.models["m"].max_context_tokens == 512
    assert [one.digest for one in world.known] == [digest_of("m")]
    assert isinstance(world.agents["local"].heard[-1], OperationsAcked)
    assert not world.view.instances
    assert world.reasons("model") == ["Ingesting", "Ingested"]
    world.check_rows()


def test_what_is_added_to_be_served_is_served_once_it_is_ingested(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec(), deploy=True))
    (op,) = agent.ops
    world.tell("local", [OperationDone(op=op, fault=Fault("not_found", "no such directory"))])
    assert world.view.models["m"].state is ModelState.FAILED
    world.ask(lambda ticket: AddModel(ticket, spec(), deploy=True))
    world.start_manager()
    world.connect("local")
    for op in list(agent.ops):
        world.tell("local", agent.finish(op))
    assert world.view.models["m"].state is ModelState.DEPLOYED
    world.check_rows()


def test_an_ingest_asked_for_while_its_node_is_away_begins_with_its_truth(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"))
    world.connect("local")
    world.lose("local")
    assert world.ask(lambda ticket: AddModel(ticket, spec())) is None
    assert not any(isinstance(one, Ingest) for one in world.agents["local"].heard)
    (told,) = (one.message for one in world.events if one.reason == "Ingesting")
    assert told == "on node local, once that is ready; it is unreachable"
    world.connect("local")
    assert sum(isinstance(one, Ingest) for one in world.agents["local"].heard) == 1
    assert world.view.models["m"].state is ModelState.STOPPED


def test_an_ingest_survives_the_manager_under_its_op(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    world.start_manager()
    agent.finish(op)
    world.connect("local")
    assert world.view.models["m"].state is ModelState.STOPPED
    assert agent.done == {}
    assert [type(one) for one in agent.heard].count(Ingest) == 1


def test_an_end_that_overtakes_its_checkpoint_waits_for_it(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    placed, done = agent.finish(op)
    world.tell("local", [done])
    assert world.view.models["m"].state is ModelState.INGESTING
    assert op in agent.done
    world.tell("local", [placed])
    assert world.view.models["m"].state is ModelState.STOPPED
    assert agent.done == {}


def test_a_failed_ingest_says_why_and_can_be_tried_again(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    world.tell("local", agent.finish(op, Fault("invalid_checkpoint", "no config.json")))
    assert world.view.models["m"].state is ModelState.FAILED
    assert world.events[-1].reason == "IngestFailed"
    answer = world.ask(lambda ticket: DeployModel(ticket, "m", None))
    assert answer is not None
    assert answer.code == "conflict"
    assert "no config.json" in answer.message
    agent.automatic = True
    world.serve(spec())
    assert world.view.models["m"].state is ModelState.DEPLOYED


def test_an_ingest_that_takes_too_long_is_cancelled(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    world.pass_time(world.settings.ingest_timeout_s + 1)
    assert world.view.models["m"].state is ModelState.FAILED
    assert any(isinstance(one, CancelOperation) for one in agent.heard)
    assert agent.ops == {}


def test_a_name_that_is_taken_is_refused_with_what_to_do(world: World) -> None:
    world.ask(lambda ticket: AddModel(ticket, spec()))
    taken = world.ask(lambda ticket: AddModel(ticket, spec()))
    assert taken is not None
    assert "serve it by `sllmctl model deploy m`, remove it first or choose another name" in taken.message
    world.ask(lambda ticket: DeployModel(ticket, "m", None))
    taken = world.ask(lambda ticket: AddModel(ticket, spec()))
    assert taken is not None
    assert "exists already (deployed); remove it first" in taken.message


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda ticket: AddModel(ticket, spec("taken")), "conflict"),
        (lambda ticket: AddModel(ticket, spec("other", node="nowhere")), "not_found"),
        (lambda ticket: AddModel(ticket, spec("other", least=3, most=2)), "invalid_input"),
        (lambda ticket: DeployModel(ticket, "nothing", None), "not_found"),
        (lambda ticket: DeployModel(ticket, "taken", ScaleSpec(min=2, max=1)), "invalid_input"),
        (lambda ticket: StopModel(ticket, "nothing"), "not_found"),
        (lambda ticket: RemoveModel(ticket, "nothing"), "not_found"),
    ],
)
def test_a_wrong_command_is_answered_and_changes_nothing(world: World, make: object, code: str) -> None:
    world.ask(lambda ticket: AddModel(ticket, spec("taken")))
    before = len(world.history)
    answer = world.ask(make)  # type: ignore[arg-type]
    assert answer is not None
    assert answer.code == code
    assert [step.changes for _, _, step in world.history[before:]] == [[]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda ticket: StopModel(ticket, "takn"), "there is no model 'takn'; did you mean 'taken'?"),
        (lambda ticket: RemoveModel(ticket, "x"), "there is no model 'x'; `sllmctl model ls` shows what there is"),
        (lambda ticket: StopInstanceNow(ticket, "x"), "there is no instance 'x'; `sllmctl instance ls` shows what there is"),
        (lambda ticket: EndOperation(ticket, "x"), "there is no operation 'x'; `sllmctl operation ls` shows what there is"),
        (lambda ticket: Pin(ticket, "ffff", None, None, True), "there is no checkpoint 'ffff'; `sllmctl checkpoint ls` shows"),
        (lambda ticket: Pin(ticket, "taken", "locl", None, True), "there is no node 'locl'; did you mean 'local'?"),
    ],
)
def test_a_name_that_nothing_has_is_answered_with_what_to_do(world: World, make: object, says: str) -> None:
    world.ask(lambda ticket: AddModel(ticket, spec("taken")))
    answer = world.ask(make)  # type: ignore[arg-type]
    assert answer is not None
    assert answer.message.startswith(says)


def test_stop_drains_its_instances_and_fails_those_who_wait(world: World) -> None:
    world.serve(spec(least=1))
    assert world.only().state is InstanceState.READY
    assert world.ask(lambda ticket: StopModel(ticket, "m")) is None
    assert world.view.models["m"].state is ModelState.STOPPED
    assert not world.view.instances
    assert world.rejected[-1].fault.code == "unschedulable"
    assert world.view.placements
    world.do(DemandChanged("m", 3, 0))
    assert not world.view.instances
    world.check_rows()


def test_remove_forgets_the_model_and_drops_its_checkpoint(world: World) -> None:
    world.serve(spec(least=1))
    agent = world.agents["local"]
    assert world.ask(lambda ticket: RemoveModel(ticket, "m")) is None
    assert [len(one) for one in (world.view.models, world.view.instances, world.view.checkpoints)] == [0, 0, 0]
    assert agent.checkpoints == {}
    assert agent.lives == {}
    assert world.models == {}
    assert agent.done == {}
    world.check_rows()


def test_remove_keeps_a_checkpoint_that_another_model_uses(world: World) -> None:
    world.serve(spec())
    world.say(FromNode("local", world.agents["local"].truth()))
    other = spec("m")
    world.ask(lambda ticket: AddModel(ticket, type(other)(name="twin", source=other.source)))
    assert list(world.view.models_of(digest_of("m"))) == ["m", "twin"]
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    assert list(world.view.models) == ["twin"]
    assert world.view.placements
    assert not any(isinstance(one, DropCheckpoint) for one in world.agents["local"].heard)


def test_remove_while_ingesting_cancels_the_ingest(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    assert world.ask(lambda ticket: RemoveModel(ticket, "m")) is None
    assert not world.view.models
    assert agent.ops == {}
    assert agent.done == {}


def test_remove_while_the_ingesting_node_is_away_cancels_when_it_is_back(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    world.lose("local")
    assert world.ask(lambda ticket: RemoveModel(ticket, "m")) is None
    assert not world.view.models
    world.connect("local")
    assert agent.ops == {}
    assert agent.done == {}


def test_a_removal_goes_on_when_neither_its_manager_nor_the_node_comes_back(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    world.say(RemoveModel(0, "m"))
    world.start_manager()
    assert not world.view.models
    world.check_rows()
    world.connect("local")
    assert agent.ops == {}


@pytest.mark.parametrize("how", ["restarted", "lost", "away"])
def test_an_ingest_that_ended_unheard_after_its_model_was_removed_leaves_no_checkpoint(world: World, how: str) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    if how == "away":
        world.lose("local")
    world.say(RemoveModel(0, "m"))
    agent.connected = False  # it does not hear that it is cancelled
    agent.finish(op)
    if how == "restarted":
        world.start_manager()
    elif how == "lost":
        world.lose("local")
    assert not world.view.models
    agent.automatic = True
    world.connect("local")
    assert (agent.checkpoints, agent.done, world.view.checkpoints) == ({}, {}, {})
    world.check_rows()


@pytest.mark.parametrize("how", ["removed", "removed before", "timed out", "timed out before"])
def test_what_an_ingest_has_brought_that_nobody_waits_for_is_dropped_when_it_is_stated(world: World, how: str) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    placed, done = agent.finish(op)
    if not how.endswith("before"):
        world.tell("local", [done])
    if how.startswith("removed"):
        world.ask(lambda ticket: RemoveModel(ticket, "m"))
    else:
        world.pass_time(world.settings.ingest_timeout_s + 1)
    if how.endswith("before"):
        world.tell("local", [done])
    agent.automatic = True
    world.tell("local", [placed])
    assert (agent.checkpoints, agent.done, world.view.checkpoints) == ({}, {}, {})
    world.check_rows()
    world.connect("local")
    world.check_rows()


def test_what_it_has_brought_on_one_node_is_dropped_there_though_another_has_it_too(make_world: MakeWorld) -> None:
    world = make_world(Agent("local"), Agent("other"))
    world.agents["other"].hold("m")
    for name in world.agents:
        world.connect(name)
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    placed, done = agent.finish(op)
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    agent.automatic = True
    world.tell("local", [done, placed])
    assert (agent.checkpoints, agent.done) == ({}, {})
    world.check_rows()


def test_an_end_whose_checkpoint_is_not_stated_even_by_the_whole_truth_is_over(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    agent.finish(op)
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    world.tell("local", [agent.done[op]])
    assert op in agent.done
    agent.checkpoints.clear()
    world.lose("local")
    world.connect("local")
    assert agent.done == {}


def test_of_the_ingests_left_on_a_node_that_stays_away_the_latest_thousand_are_remembered(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    for name in ("first", "second"):
        world.ask(lambda ticket, name=name: AddModel(ticket, spec(name)))  # type: ignore[misc]
    world.lose("local")
    for op in list(agent.ops):
        agent.finish(op)
    for name in ("first", "second", *("m" for _ in range(999))):
        if name == "m":
            world.ask(lambda ticket: AddModel(ticket, spec()))
        world.say(RemoveModel(0, name))
    agent.automatic = True
    world.connect("local")
    assert list(agent.checkpoints) == [digest_of("first")], "what is remembered of it has left the node"
    assert agent.done == {}
    world.check_rows()


def test_such_an_ingest_leaves_the_checkpoint_that_another_model_has_now(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    world.lose("local")
    world.say(RemoveModel(0, "m"))
    world.ask(lambda ticket: AddModel(ticket, spec()))
    (op,) = agent.ops
    agent.finish(op)
    again = world.view.models["m"].op
    assert again is not None
    agent.done[again] = OperationDone(op=again, digest=digest_of("m"))
    agent.automatic = True
    world.connect("local")
    assert world.view.models["m"].digest == digest_of("m")
    assert digest_of("m") in agent.checkpoints
    assert agent.done == {}
    world.check_rows()


def test_what_an_operator_fetched_while_the_manager_was_away_stays(world: World) -> None:
    agent = world.agents["local"]
    agent.automatic = False
    assert world.ask(lambda ticket: Operate(ticket, "fetch", digest_of("m"), "local", None, "file:///srv")) is None
    (op,) = agent.ops
    agent.finish(op)
    world.start_manager()
    agent.automatic = True
    world.connect("local")
    assert digest_of("m") in agent.checkpoints
    assert agent.done == {}


def test_times_that_an_earlier_manager_noted_ahead_of_the_clock_count_as_now(world: World) -> None:
    agent = world.agents["local"]
    agent.hold("old")
    agent.automatic = False
    world.ask(lambda ticket: AddModel(ticket, spec()))
    world.connect("local")
    world.now -= 10 * world.settings.ingest_timeout_s
    world.start_manager()
    assert {record.used_at for record in world.view.placements.values()} == {world.now}
    world.connect("local")
    world.pass_time(world.settings.ingest_timeout_s + 1)
    assert world.view.models["m"].state is ModelState.FAILED


def test_a_checkpoint_still_in_use_is_dropped_later(world: World) -> None:
    world.serve(spec())
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    (op,) = agent.ops
    world.tell("local", agent.finish(op, Fault("conflict", "it has users")))
    assert agent.ops == {}
    world.pass_time(world.settings.drop_retry_s)
    (again,) = agent.ops
    world.tell("local", agent.finish(again))
    assert world.view.checkpoints == {}
    assert agent.done == {}


def test_drops_are_tried_a_bounded_number_of_times(world: World) -> None:
    world.serve(spec())
    agent = world.agents["local"]
    agent.automatic = False
    world.ask(lambda ticket: RemoveModel(ticket, "m"))
    tries = 0
    while agent.ops:
        (op,) = agent.ops
        tries += 1
        world.tell("local", agent.finish(op, Fault("conflict", "it has users")))
        world.pass_time(world.settings.drop_retry_s)
    assert tries == world.settings.drop_attempts
    assert world.events[-1].reason == "DropFailed"


def test_the_end_of_an_unknown_operation_is_acknowledged(world: World) -> None:
    world.tell("local", [OperationDone(op="op_x")])
    assert world.agents["local"].heard[-1] == OperationsAcked(ops=("op_x",))


def test_a_placement_update_replaces_what_was_known_of_that_checkpoint(world: World) -> None:
    agent = world.agents["local"]
    world.serve(spec())
    agent.hold("m")
    truth = agent.checkpoints[digest_of("m")]
    dram = Placement(tier=Tier.DRAM, state=TierState.RESIDENT, size_bytes=5, users=1)
    agent.checkpoints[digest_of("m")] = type(truth)(
        **{name: getattr(truth, name) for name in truth.__struct_fields__[:-1]}, placements=(dram,)
    )
    world.tell("local", [PlacementUpdate(truth=agent.checkpoints[digest_of("m")])])
    assert [key[2] for key in world.view.placements] == [Tier.DRAM]
    assert world.view.memory.holds_arena("local", digest_of("m"))
    world.check_rows()

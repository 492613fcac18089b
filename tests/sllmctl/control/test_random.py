"""Random orders of everything that can happen: invariants hold at every step, and in the end demand is served."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schema.admin import OperationKind
from schema.errors import Fault
from schema.link import DropCheckpoint, LoadCheckpoint, StartPhases
from schema.spec import ModelSpec, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.control.events import (
    AddModel,
    ApplyModels,
    DemandChanged,
    DeployModel,
    EndOperation,
    Forget,
    InstanceActivity,
    Operate,
    Pin,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from sllmctl.control.instances import ACTIVE
from sllmctl.planner.interface import Abilities, NoJournals
from tests.examples import examples
from tests.sllmctl.control.agents import Said
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState
NODES = ("a", "b")
MODELS = ("m0", "m1", "m2")
PHASES = StartPhases(load_s=1.0, loaded_from=Tier.DISK, loaded_bytes=8 << 20, build_s=0.5, total_s=2.0)
HEALED_S = 900.0
"""By then all who wait are served: what is planned without hope has been given up, and drains have come to their end."""
nodes = st.sampled_from(NODES)
models = st.sampled_from(MODELS)
picks = st.integers(0, 7)
places = st.sampled_from((*NODES, None))
REMOTE = "file:///srv/models"
OPERATIONS: tuple[tuple[OperationKind, Tier | None], ...] = (
    ("prefetch", Tier.DRAM), ("verify", None), ("drop", None), ("drop", Tier.DISK), ("drop", Tier.DRAM), ("drop", Tier.DEVICE),
    ("publish", None), ("fetch", Tier.DISK),
)  # fmt: skip


class RunningJournals(NoJournals):
    """What runs according to the view has 64 tokens each, and 5 s to go."""

    view = ClusterView()

    def tokens(self, instance: str) -> list[int]:
        return [64] * self.view.instances[instance].running

    def remaining_s(self, instance: str) -> float:
        return 5.0 if self.view.instances[instance].running else 0.0


class Cluster(RuleBasedStateMachine):
    """Two nodes of two places each, three models; agents answer when the machine says so."""

    abilities = Abilities()

    def __init__(self) -> None:
        super().__init__()
        self.journals = RunningJournals()
        agents = self.make_agents()
        for agent in agents:
            agent.automatic = False
            for name in MODELS:
                agent.hold(name)
        settings = ControlSettings(restarts_max=1, retry_first_s=15.0, healthy_s=20.0, prefetch_every_s=20.0)
        self.world = World(*agents, settings=settings, abilities=self.abilities, journals=self.journals)
        self.journals.view = self.world.view

    def make_agents(self) -> list[Agent]:
        return [Agent(name) for name in NODES]

    def spec(self, name: str, **rule: Any) -> ModelSpec:
        return spec(name, node="a", **rule)

    @initialize(least=st.integers(0, 1), keep=st.sampled_from([0.0, 5.0, 60.0]))
    def serve_all(self, least: int, keep: float) -> None:
        """Everything stands: both nodes hold and serve all models."""
        for agent in self.world.agents.values():
            agent.automatic = True
        for name in NODES:
            self.world.connect(name)
        for number, name in enumerate(MODELS):
            self.world.serve(self.spec(name, least=least * (number == 0), most=1 + number, keep_alive_s=keep))
        for agent in self.world.agents.values():
            agent.automatic = False

    def teardown(self) -> None:
        try:
            self.heal()
        finally:
            self.world.close()

    # --- operators ---

    @rule(name=models, least=st.integers(0, 1), most=st.integers(1, 3), keep=st.sampled_from([0.0, 5.0, 60.0]))
    def add_and_deploy(self, name: str, least: int, most: int, keep: float) -> None:
        world = self.world
        world.ask(lambda ticket: AddModel(ticket, self.spec(name, least=least, most=most, keep_alive_s=keep)))
        agent = world.agents["a"]
        for op in list(agent.ops):
            world.tell("a", agent.finish(op))
        world.ask(lambda ticket: DeployModel(ticket, name, None))

    @rule(name=models, most=st.integers(1, 3))
    def rescale(self, name: str, most: int) -> None:
        self.world.ask(lambda ticket: DeployModel(ticket, name, ScaleSpec(max=most, keep_alive_s=5.0, max_concurrency=4)))

    @rule(name=models)
    def stop_model(self, name: str) -> None:
        self.world.ask(lambda ticket: StopModel(ticket, name))

    @rule(name=models, surely=st.integers(0, 3))
    def remove_model(self, name: str, surely: int) -> None:
        if surely:
            return
        self.world.ask(lambda ticket: RemoveModel(ticket, name))

    @precondition(lambda self: self.world.view.instances)
    @rule(pick=picks)
    def stop_instance(self, pick: int) -> None:
        ids = sorted(self.world.view.instances)
        self.world.ask(lambda ticket: StopInstanceNow(ticket, ids[pick % len(ids)]))

    # --- clients ---

    @rule(name=models, waiting=st.integers(1, 9))
    def burst(self, name: str, waiting: int) -> None:
        """Requests come and, since all is well, are served."""
        self.world.demand(name, waiting)
        self.progress()

    @rule()
    def progress(self) -> None:
        """Whatever starts becomes ready, whatever drains has finished."""
        for node, agent in self.world.agents.items():
            for id_, life in list(agent.lives.items()):
                if life.state is _I.STARTING:
                    self.world.tell(node, agent.become(id_, _I.READY))
                elif life.state is _I.DRAINING:
                    self.world.tell(node, agent.become(id_, _I.STOPPED))

    @rule(name=models, waiting=st.integers(0, 9), running=st.integers(0, 4))
    def demand(self, name: str, waiting: int, running: int) -> None:
        self.world.demand(name, waiting, running)

    @precondition(lambda self: self.world.view.instances)
    @rule(pick=picks, running=st.integers(0, 4))
    def activity(self, pick: int, running: int) -> None:
        ids = sorted(self.world.view.instances)
        self.world.do(InstanceActivity(ids[pick % len(ids)], running))

    # --- nodes ---

    @rule(node=nodes)
    def connect(self, node: str) -> None:
        self.world.connect(node)

    @rule(node=nodes)
    def lose(self, node: str) -> None:
        self.world.lose(node)

    @rule(node=nodes)
    def away_for_too_long(self, node: str) -> None:
        """Its instances are given up, and perhaps begun elsewhere; when it is back it still has them."""
        self.world.lose(node)
        self.world.pass_time(self.world.settings.unreachable_grace_s)
        self.world.connect(node)

    @rule(node=nodes, forgets=st.booleans())
    def restart_manager_and_perhaps_a_node(self, node: str, forgets: bool) -> None:
        if forgets:
            self.world.agents[node].forget()
        self.world.start_manager()
        self.journals.view = self.world.view

    @rule(node=nodes, pick=picks, well=st.booleans())
    def end_operation(self, node: str, pick: int, well: bool) -> None:
        agent = self.world.agents[node]
        if agent.ops:
            op = sorted(agent.ops)[pick % len(agent.ops)]
            busy = (
                Fault("conflict", "it has users") if isinstance(agent.ops[op], DropCheckpoint) else Fault("internal", "broke")
            )
            self.world.tell(node, agent.finish(op, None if well else busy))

    @rule(node=nodes, pick=picks, what=st.sampled_from(["ready", "whole", "crash", "end", "drain"]))
    def live(self, node: str, pick: int, what: str) -> None:
        agent = self.world.agents[node]
        ids = sorted(id_ for id_, life in agent.lives.items() if life.state is not _I.STOPPED)
        if not ids:
            return
        id_ = ids[pick % len(ids)]
        state = agent.lives[id_].state
        if what == "ready" and state is _I.STARTING:
            self.world.tell(node, agent.become(id_, _I.READY))
        elif what == "whole" and state is _I.READY:
            phases, agent.phases = agent.phases, PHASES
            self.world.tell(node, agent.become(id_, _I.READY))
            agent.phases = phases
        elif what == "crash":
            self.world.tell(node, agent.become(id_, _I.STOPPED, Fault("internal", "it was killed")))
        elif what == "end" and state is _I.DRAINING:
            self.world.tell(node, agent.become(id_, _I.STOPPED))
        elif what == "drain" and state is _I.READY:
            self.world.tell(node, agent.become(id_, _I.DRAINING))

    @precondition(lambda self: self.world.view.instances)
    @rule(pick=picks, code=st.sampled_from(["internal", "invalid_checkpoint"]), away=st.booleans())
    def give_up(self, pick: int, code: str, away: bool) -> None:
        """One that is waited for dies as often as it is begun; then its node, perhaps, is away over the pause."""
        world = self.world
        instance = world.view.instances[sorted(world.view.instances)[pick % len(world.view.instances)]]
        agent = world.agents[instance.node]
        world.demand(instance.model, 1)
        for _ in range(world.settings.restarts_max + 1):
            life = agent.lives.get(instance.id)
            if agent.connected and life is not None and life.state in (_I.STARTING, _I.READY):
                world.tell(agent.name, agent.become(instance.id, _I.STOPPED, Fault(code, "it was killed")))
            if instance.state is _I.BACKOFF and instance.retry_at is not None:
                world.pass_time(max(0.0, instance.retry_at - world.now))
        if away:
            world.lose(agent.name)
            world.pass_time(world.settings.retry_first_s + 1.0)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # --- what always holds ---

    @invariant()
    def rows_and_indexes_agree(self) -> None:
        self.world.check_rows()

    @invariant()
    def no_device_is_used_twice(self) -> None:
        for name, agent in self.world.agents.items():
            for device in range(agent.devices):
                assert agent.used_bytes(device) <= agent.device_mib << 20
                assert self.world.view.memory.live_bytes(name, device) <= agent.device_mib << 20
            assert agent.dram_bytes() <= agent.arena_mib << 20

    @invariant()
    def what_is_planned_begins_or_goes_in_time(self) -> None:
        for one in self.world.view.instances.values():
            if one.state is _I.PLANNED:
                assert self.world.now - one.life_at <= self.world.settings.room_timeout_s

    @invariant()
    def what_failed_is_tried_again_in_time(self) -> None:
        for one in self.world.view.instances.values():
            if one.state is _I.FAILED:
                assert one.fault is not None
                assert one.fault.code == "invalid_checkpoint" or (one.retry_at or 0.0) >= self.world.now

    @invariant()
    def moves_are_of_those_that_are_there(self) -> None:
        view, moves = self.world.view, self.world.loop._core.moves
        for moving in moves.values():
            assert view.instances[moving.source].state is _I.READY
            assert view.instances[moving.target].state in (_I.PLANNED, _I.STARTING)
            assert view.instances[moving.cause].state is _I.PLANNED
        assert {one.id for one in view.instances.values() if one.moving} == set(moves)

    @invariant()
    def no_model_has_more_than_it_may(self) -> None:
        for model in self.world.view.models.values():
            there = self.world.view.instances_of(model.name).values()
            active = [one for one in there if one.state in (*ACTIVE, _I.FAILED) and not one.moving]
            if all(self.world.view.nodes[one.node].state is NodeState.READY for one in active):
                assert len(active) <= model.spec.scale.max

    @invariant()
    def what_is_waited_for_is_on_its_way(self) -> None:
        core = self.world.loop._core
        there = self.world.view.instances
        coming = {id_ for id_, one in there.items() if one.state is _I.STARTING or (one.state is _I.READY and not one.phases)}
        assert core.estimates._records.keys() <= coming | core.prefetches.keys()

    @invariant()
    def an_instance_lives_once(self) -> None:
        """A life that a connected node holds is the present one of its instance, or about to be ended."""
        for name, agent in self.world.agents.items():
            if not agent.connected:
                continue
            for id_, life in agent.lives.items():
                if life.state in (_I.STARTING, _I.READY):
                    known = self.world.view.instances.get(id_)
                    assert known is not None
                    assert (known.node, known.epoch) == (name, life.epoch)

    @invariant()
    def the_router_knows_every_instance(self) -> None:
        assert self.world.routes.keys() == {id_ for id_, one in self.world.view.instances.items() if one.state is not _I.FAILED}
        for id_, effect in self.world.routes.items():
            instance = self.world.view.instances[id_]
            assert (effect.epoch, effect.state) == (instance.epoch, instance.state)

    # --- the end: everything is well again, and all who wait are served ---

    def heal(self) -> None:
        world = self.world
        for agent in world.agents.values():
            agent.automatic = True
            for op in list(agent.ops):
                agent.finish(op)
            for id_, life in list(agent.lives.items()):
                if life.state in (_I.DRAINING, _I.STOPPING):
                    agent.become(id_, _I.STOPPED)
                elif life.state is _I.STARTING:
                    agent.become(id_, _I.READY)
        for name in NODES:
            world.agents[name].connected = False
            world.lose(name)
            world.connect(name)
        wanted = [model.name for model in world.view.models.values() if model.state is ModelState.DEPLOYED]
        for name in wanted:
            world.ask(lambda ticket, name=name: DeployModel(ticket, name, None))  # type: ignore[misc]
            world.demand(name, 0)
        for id_ in list(world.view.instances):
            world.do(InstanceActivity(id_, 0))
        world.rejected.clear()
        for name in wanted:
            world.do(DemandChanged(name, 1, 0))
        left = set(wanted)
        began = world.now
        while left:
            for name in sorted(left):
                if self.serve_one(name) or (not self.can_start(name) and any(one.model == name for one in world.rejected)):
                    left.discard(name)
                    world.do(DemandChanged(name, 0, 0))
            assert not left or world.now - began <= HEALED_S, f"{left} wait for ever"
            world.pass_time(5.0)
        assert not any(model.state in (ModelState.INGESTING, ModelState.DELETING) for model in world.view.models.values())
        self.rows_and_indexes_agree()

    def can_start(self, name: str) -> bool:
        """True where some node has its weights, and as many devices as it spans."""
        devices, agents = self.world.view.models[name].spec.devices, self.world.agents.values()
        return any(digest_of(name) in agent.checkpoints and agent.devices >= devices for agent in agents)

    def serve_one(self, name: str) -> bool:
        """A request runs and ends, if there is an instance for it."""
        for one in self.world.view.instances_of(name).values():
            if one.state is _I.READY:
                self.world.busy(one, 1)
                self.world.busy(one, 0)
                return True
        return False


class Devices(Cluster):
    """The same, with weights on devices, one model that spans two of them, and DRAM for three of the four models' weights."""

    def make_agents(self) -> list[Agent]:
        return [
            Agent("a", kind="cuda", devices=2, device_mib=34, arena_mib=24),
            Agent("b", kind="cuda", devices=1, device_mib=45, arena_mib=24),
        ]

    def spec(self, name: str, **rule: Any) -> ModelSpec:
        return spec(name, node="a", devices=2 if name == "m2" else 1, **rule)


class Migrations(Devices):
    """The same, and busy instances migrate."""

    abilities = Abilities(migrate=True)


class CarefulAgent(Agent):
    """One whose store refuses what an operator wants loaded beyond the arena, and whose disk's copies may be found wrong."""

    def finish(self, op: str, fault: Fault | None = None) -> list[Said]:
        asked = self.ops[op]
        if isinstance(asked, LoadCheckpoint) and asked.digest in self.checkpoints and asked.digest not in self.dram:
            size = self.checkpoints[asked.digest].image_bytes
            if self.dram_bytes() + size > self.arena_mib << 20:
                fault = fault or Fault("out_of_memory", "the arena is full")
        return super().finish(op, fault)

    def judge(self, digest: str, state: TierState) -> list[Said]:
        """Its copy on disk is found wrong, or sound again."""
        truth = self.checkpoints[digest]
        placements = tuple(
            msgspec.structs.replace(one, state=state) if one.tier is Tier.DISK else one for one in truth.placements
        )
        self.checkpoints[digest] = msgspec.structs.replace(truth, placements=placements)
        return [self._restate(digest)]


class Operators(Devices):
    """The same, with all that operators do to checkpoints and specs meanwhile, copies found wrong, and a remote."""

    abilities = Abilities(published=True)

    def make_agents(self) -> list[Agent]:
        return [
            CarefulAgent("a", kind="cuda", devices=2, device_mib=34, arena_mib=24),
            CarefulAgent("b", kind="cuda", devices=1, device_mib=45, arena_mib=24),
        ]

    @rule(name=models, node=places, tier=st.sampled_from([None, Tier.DRAM, Tier.DISK]), pinned=st.booleans())
    def pin(self, name: str, node: str | None, tier: Tier | None, pinned: bool) -> None:
        self.world.ask(lambda ticket: Pin(ticket, name, node, tier, pinned))

    @rule(name=models, node=places, what=st.sampled_from(OPERATIONS))
    def operate(self, name: str, node: str | None, what: tuple[OperationKind, Tier | None]) -> None:
        kind, tier = what
        url = REMOTE if kind in ("publish", "fetch") else None
        self.world.ask(lambda ticket: Operate(ticket, kind, name, node, tier, url))

    @precondition(lambda self: self.world.view.operations)
    @rule(pick=picks)
    def cancel_operation(self, pick: int) -> None:
        ids = list(self.world.view.operations)[-8:]
        self.world.ask(lambda ticket: EndOperation(ticket, ids[pick % len(ids)]))

    @rule(name=models)
    def forget_remote(self, name: str) -> None:
        self.world.ask(lambda ticket: Forget(ticket, name, None))

    @rule(name=models, kv_mib=st.sampled_from([10, 14]), most=st.integers(1, 3), deploy=st.booleans(), dry=st.booleans())
    def apply(self, name: str, kv_mib: int, most: int, deploy: bool, dry: bool) -> None:
        wanted = self.spec(name, most=most, kv_mib=kv_mib)
        self.world.ask(lambda ticket: ApplyModels(ticket, (wanted,), deploy=deploy, dry_run=dry))

    @rule(node=nodes, name=models, sound=st.booleans())
    def judge(self, node: str, name: str, sound: bool) -> None:
        agent, digest = self.world.agents[node], digest_of(name)
        assert isinstance(agent, CarefulAgent)
        if digest in agent.checkpoints:
            self.world.tell(node, agent.judge(digest, TierState.RESIDENT if sound else TierState.QUARANTINED))

    @invariant()
    def what_is_kept_of_operations_is_of_them(self) -> None:
        core = self.world.loop._core
        assert {(one.node, one.digest, one.tier) for one in core.drops.values()} == core.dropping.keys()
        running = {id_ for id_, one in self.world.view.operations.items() if one.ended_at is None}
        loads = {id_ for id_ in core.prefetches if id_ in self.world.view.operations}
        assert loads <= running

    def heal(self) -> None:
        for agent in self.world.agents.values():
            assert isinstance(agent, CarefulAgent)
            for digest in agent.checkpoints:
                agent.judge(digest, TierState.RESIDENT)
        for digest, node, tier in list(self.world.view.pins):
            self.world.ask(lambda ticket, key=(digest, node, tier): Pin(ticket, *key, False))  # type: ignore[misc]
        super().heal()


_RUNS = settings(max_examples=examples(30), stateful_step_count=40, suppress_health_check=list(HealthCheck))

TestCluster = Cluster.TestCase
TestDevices = Devices.TestCase
TestOperators = Operators.TestCase
TestMigrations = pytest.mark.slow(Migrations.TestCase)
TestCluster.settings = TestDevices.settings = TestOperators.settings = TestMigrations.settings = _RUNS

"""Random orders of everything that can happen: invariants hold at every step, and in the end demand is served."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schema.errors import Fault
from schema.link import DropCheckpoint
from schema.spec import ScaleSpec
from schema.states import InstanceState, ModelState
from sllmctl.control.effects import (
    AddModel,
    DemandChanged,
    DeployModel,
    InstanceActivity,
    RemoveModel,
    StopInstanceNow,
    StopModel,
)
from sllmctl.control.settings import ControlSettings
from sllmctl.control.view import STANDING
from tests.sllmctl.control.world import Agent, World, digest_of, spec

_I = InstanceState
NODES = ("a", "b")
MODELS = ("m0", "m1", "m2")
nodes = st.sampled_from(NODES)
models = st.sampled_from(MODELS)
picks = st.integers(0, 7)


class Cluster(RuleBasedStateMachine):
    """Two nodes of two places each, three models; agents answer when the machine says so."""

    def __init__(self) -> None:
        super().__init__()
        agents = [Agent(name, automatic=False) for name in NODES]
        for agent in agents:
            for name in MODELS:
                agent.hold(name)
        self.world = World(*agents, settings=ControlSettings(restarts_max=3, healthy_s=20.0))

    @initialize(least=st.integers(0, 1), keep=st.sampled_from([0.0, 5.0, 60.0]))
    def serve_all(self, least: int, keep: float) -> None:
        """Everything stands: both nodes hold and serve all models."""
        for agent in self.world.agents.values():
            agent.automatic = True
        for name in NODES:
            self.world.connect(name)
        for number, name in enumerate(MODELS):
            self.world.serve(spec(name, least=least * (number == 0), most=1 + number, keep_alive_s=keep, node="a"))
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
        world.ask(lambda ticket: AddModel(ticket, spec(name, least=least, most=most, keep_alive_s=keep, node="a")))
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
            self.world.agents[node].lives.clear()
            self.world.agents[node].ops.clear()
        self.world.start_manager()

    @rule(node=nodes, pick=picks, well=st.booleans())
    def end_operation(self, node: str, pick: int, well: bool) -> None:
        agent = self.world.agents[node]
        if agent.ops:
            op = sorted(agent.ops)[pick % len(agent.ops)]
            busy = (
                Fault("conflict", "it has users") if isinstance(agent.ops[op], DropCheckpoint) else Fault("internal", "broke")
            )
            self.world.tell(node, agent.finish(op, None if well else busy))

    @rule(node=nodes, pick=picks, what=st.sampled_from(["ready", "crash", "end", "drain"]))
    def live(self, node: str, pick: int, what: str) -> None:
        agent = self.world.agents[node]
        ids = sorted(id_ for id_, life in agent.lives.items() if life.state is not _I.STOPPED)
        if not ids:
            return
        id_ = ids[pick % len(ids)]
        state = agent.lives[id_].state
        if what == "ready" and state is _I.STARTING:
            self.world.tell(node, agent.become(id_, _I.READY))
        elif what == "crash":
            self.world.tell(node, agent.become(id_, _I.STOPPED, Fault("internal", "it was killed")))
        elif what == "end" and state is _I.DRAINING:
            self.world.tell(node, agent.become(id_, _I.STOPPED))
        elif what == "drain" and state is _I.READY:
            self.world.tell(node, agent.become(id_, _I.DRAINING))

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
            taken = sum(one.kv_bytes for one in self.world.view.instances_on(name).values() if one.state in STANDING)
            assert taken <= agent.device_mib << 20

    @invariant()
    def no_model_has_more_than_it_may(self) -> None:
        for model in self.world.view.models.values():
            there = self.world.view.instances_of(model.name).values()
            active = [one for one in there if one.state in (_I.STARTING, _I.READY, _I.BACKOFF, _I.FAILED)]
            assert len(active) <= model.spec.scale.max

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
        for name in wanted:
            world.rejected.clear()
            world.do(DemandChanged(name, 1, 0))
            held = any(digest_of(name) in agent.checkpoints for agent in world.agents.values())
            for _ in range(100):
                if self.served(name) or world.rejected:
                    break
                world.pass_time(60.0)
            assert self.served(name) or (not held and world.rejected)
            world.do(DemandChanged(name, 0, 0))
        assert not any(model.state in (ModelState.INGESTING, ModelState.DELETING) for model in world.view.models.values())
        self.rows_and_indexes_agree()

    def served(self, name: str) -> bool:
        return any(one.state is _I.READY for one in self.world.view.instances_of(name).values())


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))

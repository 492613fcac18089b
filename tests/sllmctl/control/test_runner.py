"""The runner over a real database: group commits, effects after them, answers, wake-ups, and loud failures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from schema.errors import Conflict, NotFound, OutOfSpace, TimedOut, Unreachable
from schema.ids import EpochCounter, system_ids
from schema.link import ManagerMessage
from sllmctl.cluster.changes import RowChange
from sllmctl.cluster.settings import ControlSettings
from sllmctl.control.clock import LoopClock
from sllmctl.control.effects import Effect, ModelChanged, RejectWaiting, RouteChanged
from sllmctl.control.events import AddModel, AddNode, DeployModel, Event, FromNode, StopModel
from sllmctl.control.live import LiveEffects
from sllmctl.control.runner import Runner
from sllmctl.state import Database
from tests.sllmctl.control.world import Agent, control_loop, spec


class Outside:
    """Links, router and assets that write down what they are told, and an agent behind the link."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object]] = []
        self.agent = Agent("local")
        self.post: Callable[[Event], None] | None = None
        self.heard = asyncio.Event()

    def _note(self, what: str, value: object) -> None:
        self.said.append((what, value))
        self.heard.set()

    async def until(self, what: str) -> object:
        """The first thing of this kind that was said."""
        while True:
            for kind, value in self.said:
                if kind == what:
                    return value
            self.heard.clear()
            await asyncio.wait_for(self.heard.wait(), 60)

    def connect(self, node: str, address: str) -> None:
        self._note("connect", node)
        assert self.post is not None
        self.post(FromNode(node, self.agent.truth()))

    def send(self, node: str, message: ManagerMessage) -> None:
        self._note(type(message).__name__, message)
        assert self.post is not None
        for answer in self.agent.hear(message):
            self.post(FromNode(node, answer))

    def route_changed(self, effect: RouteChanged) -> None:
        self._note(effect.state.value, effect)

    def model_changed(self, effect: ModelChanged) -> None:
        self._note(f"model {effect.state.value}", effect)

    def reject_waiting(self, effect: RejectWaiting) -> None:
        self._note("reject", effect)

    def known(self, digest: str, node: str) -> None:
        self._note("known", digest)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/state.db", backup_dir=tmp_path)
    yield database
    await database.close()


async def test_a_model_from_add_to_ready_through_the_real_database(database: Database) -> None:
    outside = Outside()
    view = await database.load()
    generation = (await database.claim(1.0, "u")).generation
    loop = control_loop(view, ids=system_ids, epochs=EpochCounter(generation), settings=ControlSettings())
    live = LiveEffects(database, outside, outside, outside, logging.getLogger("test"))
    runner = Runner(loop, live, time.time)
    outside.post = runner.post
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("local", "local", "unix:/x"))
    await outside.until("connect")
    await runner.ask(lambda ticket: AddModel(ticket, spec(least=1)))
    with pytest.raises(Conflict, match="exists already"):
        await runner.ask(lambda ticket: AddModel(ticket, spec()))
    with pytest.raises(NotFound):
        await runner.ask(lambda ticket: StopModel(ticket, "nothing"))
    await outside.until("model stopped")
    await runner.ask(lambda ticket: DeployModel(ticket, "m", None))
    await outside.until("ready")
    await runner.stop()
    await running
    stored = await database.load()
    assert [one.state.value for one in stored.instances.values()] == ["ready"]
    assert [one.reason for one in await database.events(kind="instance")] == ["Scheduled", "Ready"]
    with pytest.raises(Unreachable, match="stopping"):
        await runner.ask(lambda ticket: StopModel(ticket, "m"))


class Recorder:
    """Effects whose commits wait until they are let through, or fail."""

    def __init__(self) -> None:
        self.commits: list[list[RowChange]] = []
        self.performed: list[Effect] = []
        self.more = asyncio.Event()
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.failure: Exception | None = None

    async def commit(self, changes: Sequence[RowChange]) -> None:
        self.commits.append(list(changes))
        self.began.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    def perform(self, effect: Effect) -> None:
        self.performed.append(effect)
        self.more.set()


def _runner(recorder: Recorder, clock: Callable[[], float] | None = None, **rules: float) -> Runner:
    from sllmctl.cluster.view import ClusterView

    settings = ControlSettings(**rules)  # type: ignore[arg-type]
    return Runner(
        control_loop(ClusterView(), ids=system_ids, epochs=EpochCounter(1), settings=settings), recorder, clock or LoopClock()
    )


async def test_events_that_arrive_during_a_commit_share_the_next(database: Database) -> None:
    recorder = Recorder()
    runner = _runner(recorder)
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("n0", "n0", "unix:/0"))
    await recorder.began.wait()
    for number in range(1, 6):
        runner.post(AddNode(f"n{number}", f"n{number}", f"unix:/{number}"))
    assert recorder.performed == []
    recorder.gate.set()
    await runner.stop()
    await running
    assert [sum(type(row).__name__ == "PutNode" for row in commit) for commit in recorder.commits] == [1, 5]
    connected = [effect.node for effect in recorder.performed if type(effect).__name__ == "Connect"]  # type: ignore[union-attr]
    assert connected == [f"n{number}" for number in range(6)]


async def test_a_failed_commit_ends_the_manager_and_nothing_is_done(database: Database) -> None:
    recorder = Recorder()
    recorder.failure = OutOfSpace("the disk is full")
    recorder.gate.set()
    runner = _runner(recorder)
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("n0", "n0", "unix:/0"))
    with pytest.raises(OutOfSpace):
        await running
    assert recorder.performed == []
    with pytest.raises(OutOfSpace, match="the disk is full"):
        await runner.ask(lambda ticket: StopModel(ticket, "m"))


async def test_who_asks_for_what_a_full_disk_keeps_from_being_done_is_told_so() -> None:
    recorder = Recorder()
    runner = _runner(recorder)
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("n0", "n0", "unix:/0"))
    await recorder.began.wait()
    recorder.failure = OutOfSpace("the disk is full")
    asked = asyncio.create_task(runner.ask(lambda ticket: StopModel(ticket, "m")))
    recorder.gate.set()
    with pytest.raises(OutOfSpace):
        await asked
    with pytest.raises(OutOfSpace):
        await running


async def test_an_ask_without_an_answer_ends_in_time() -> None:
    recorder = Recorder()
    runner = _runner(recorder, reply_timeout_s=0.05)
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("n0", "n0", "unix:/0"))
    await recorder.began.wait()
    with pytest.raises(TimedOut, match="reply_timeout_s"):
        await runner.ask(lambda ticket: StopModel(ticket, "m"))
    recorder.gate.set()
    await runner.stop()
    await running


async def test_the_loop_is_woken_at_the_time_it_asked_for(database: Database) -> None:
    outside = Outside()
    settings = ControlSettings(scale_up_after_s=0.0)
    view = await database.load()
    loop = control_loop(view, ids=system_ids, epochs=EpochCounter(1), settings=settings)
    runner = Runner(loop, LiveEffects(database, outside, outside, outside, logging.getLogger("test")), time.time)
    outside.post = runner.post
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("local", "local", "unix:/x"))
    await outside.until("connect")
    await runner.ask(lambda ticket: AddModel(ticket, spec(least=1, keep_alive_s=0.05)))
    await outside.until("model stopped")
    await runner.ask(lambda ticket: DeployModel(ticket, "m", None))
    await outside.until("ready")
    await runner.ask(lambda ticket: DeployModel(ticket, "m", spec(keep_alive_s=0.05).scale))
    await outside.until("draining")
    await runner.stop()
    await running
    assert not view.instances


async def test_the_loop_is_woken_although_the_clock_was_set_back() -> None:
    recorder = Recorder()
    recorder.gate.set()
    set_back_s = 0.0
    runner = _runner(recorder, LoopClock(wall=lambda: time.time() - set_back_s), ingest_timeout_s=0.5)
    running = asyncio.create_task(runner.run())
    runner.post(AddNode("n0", "n0", "unix:/0"))
    await runner.ask(lambda ticket: AddModel(ticket, spec(node="n0")))
    set_back_s = 3600.0
    async with asyncio.timeout(30):
        while not any(isinstance(effect, ModelChanged) and effect.state == "failed" for effect in recorder.performed):
            await recorder.more.wait()
            recorder.more.clear()
    await runner.stop()
    await running

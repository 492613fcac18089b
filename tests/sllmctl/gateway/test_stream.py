"""The event stream: a picture, then what changes; cursors, slow readers, bounds; and the typed clients that follow it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from schema.admin import EventView, ProgressView, RequestTimeline, RequestView, StatusView, StreamFrame
from schema.errors import InvalidInput, Overloaded, Unreachable
from schema.ids import Epoch
from schema.link import InstanceLoad, InstanceTruth
from schema.spec import ModelSpec, PathSource
from schema.states import InstanceState, ModelState, NodeState, RequestState, Tier, TierState
from sllmctl.client import AdminClient, AsyncAdminClient
from sllmctl.cluster.changes import PutInstance, PutPlacement, RemoveInstance
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PlacementRecord
from sllmctl.cluster.view import ClusterView
from sllmctl.config import ClientSettings, StreamSettings
from sllmctl.gateway.admin.app import admin_app
from sllmctl.gateway.admin.feed import Feed
from sllmctl.gateway.admin.picture import KINDS, Picture

_DIGEST = "ab" * 32
_ALL = frozenset(KINDS)
_STATUS = StatusView(
    cluster="c", generation=1, version="0", pid=1, started_at=0.0, api_url="", ready=True, nodes_ready=1, nodes=1
)


def _event(number: int) -> EventView:
    return EventView(id=f"ev_{number}", at=1.0, level="info", kind="model", object="m", reason="added", message="added")


class _Live:
    """The router's part; also the database's events."""

    def __init__(self) -> None:
        self.now: dict[str, RequestView] = {}
        self.load: InstanceLoad | None = None
        self.asked_for = 0

    def model_counts(self, model: str) -> tuple[int, int]:
        return (0, len(self.now))

    def instance_load(self, instance: str) -> InstanceLoad | None:
        return self.load

    def progress(self, op_or_instance: str) -> ProgressView | None:
        return None

    def loads(self, node: str) -> list[tuple[str, ProgressView]]:
        return []

    def moving(self) -> list[tuple[str, str]]:
        return []

    def requests(self) -> list[RequestView]:
        self.asked_for += 1
        return list(self.now.values())

    def request(self, id: str) -> RequestView:  # noqa: A002
        return self.now[id]

    def cancel(self, id: str) -> None:  # noqa: A002
        raise AssertionError(id)

    async def events(self, *_: Any, **__: Any) -> list[EventView]:
        return [_event(1)]

    async def ask(self, make: Any) -> None:
        raise AssertionError(make)


class _Rig:
    """A feed over a real view with one model, one node and ``count`` instances."""

    def __init__(self, count: int = 2, **settings: Any) -> None:
        self.view, self.live = ClusterView(), _Live()
        self.view.add_node(Node("node_1", "local", "unix:/a", NodeState.READY, False, 1.0, 2.0))
        self.view.add_checkpoint(Checkpoint(_DIGEST, "LlamaForCausalLM", 4096, 64, 512, 5.0))
        spec = ModelSpec(name="m", source=PathSource("/m"))
        self.view.add_model(Model(spec, ModelState.DEPLOYED, _DIGEST, None, None, None, 10.0, 11.0))
        for number in range(count):
            self.add_instance(f"inst_{number}")
        chosen = StreamSettings(**{"every_s": 0.001, "idle_s": 60.0, **settings})
        self.feed = Feed(
            view=self.view,
            live=self.live,
            database=self.live,
            status=lambda: _STATUS,
            settings=chosen,
            clock=lambda: 77.0,
        )

    def add_instance(self, name: str) -> Instance:
        state = InstanceState.STARTING
        made = Instance(name, "m", "node_1", _DIGEST, Epoch(5), state, (0,), 1024, 0, None, None, None, "room", 20.0, 21.0)
        self.view.add_instance(made)
        return made

    def commit(self, *instances: Instance) -> None:
        self.feed.committed([_row(instance) for instance in instances])

    def remove(self, name: str) -> None:
        self.view.drop_instance(self.view.instances[name])
        self.feed.committed([RemoveInstance(name)])

    def request(self, name: str, tokens: int) -> None:
        self.live.now[name] = RequestView(
            id=name,
            model="m",
            state=RequestState.RUNNING,
            instance="inst_0",
            attempts=1,
            prompt_tokens=3,
            generated_tokens=tokens,
            orphaned=False,
            received_at=1.0,
            timeline=RequestTimeline(cold=False),
        )


def _row(instance: Instance) -> PutInstance:
    truth = InstanceTruth(
        instance=instance.id, epoch=instance.epoch, digest=instance.digest, state=instance.state, devices=instance.devices
    )
    return PutInstance(truth, instance.model, instance.node, 1024, 0, None, "room", 20.0, 21.0)


@contextlib.asynccontextmanager
async def _reading(rig: _Rig, cursor: str | None = None) -> AsyncIterator[AsyncIterator[StreamFrame | None]]:
    frames = rig.feed.read(cursor, _ALL)
    try:
        yield frames
    finally:
        await frames.aclose()  # type: ignore[attr-defined]


async def _next(frames: AsyncIterator[StreamFrame | None]) -> StreamFrame:
    frame = await asyncio.wait_for(anext(frames), 60)
    assert frame is not None
    return frame


async def _until(frames: AsyncIterator[StreamFrame | None], kind: str) -> StreamFrame:
    """The next frame with something of a kind."""
    while True:
        frame = await _next(frames)
        if getattr(frame, kind):
            return frame


async def test_a_model_is_looked_at_when_something_is_told_of_it() -> None:
    rig = _Rig()
    async with _reading(rig) as frames:
        await _next(frames)
        rig.view.models["m"].no_place = "no node can hold it"
        rig.feed.committed([_event(2)])
        frame = await _until(frames, "models")
        assert frame.models[0].no_place == "no node can hold it"


async def test_a_picture_comes_first_and_then_only_what_changed() -> None:
    rig = _Rig()
    async with _reading(rig) as frames:
        first = await _next(frames)
        assert (first.fresh, first.more, first.at, first.status) == (True, False, 77.0, _STATUS)
        assert [one.id for one in first.instances] == ["inst_0", "inst_1"]
        assert (first.nodes[0].instances, first.models[0].instances, first.events) == (2, {"starting": 2}, (_event(1),))

        instance = rig.view.instances["inst_1"]
        rig.view.set_state(instance, InstanceState.READY)
        rig.commit(instance)
        change = await _next(frames)
        assert [(one.id, one.state) for one in change.instances] == [("inst_1", InstanceState.READY)]
        assert change.models[0].instances == {"starting": 1, "ready": 1}
        assert (change.fresh, change.status, change.checkpoints, change.events) == (False, None, (), ())

        rig.remove("inst_0")
        change = await _next(frames)
        assert (change.gone, change.nodes[0].instances) == ({"instances": ("inst_0",)}, 1)
    await rig.feed.close_feed()


async def test_requests_are_followed_with_their_model_and_instance() -> None:
    rig = _Rig()
    async with _reading(rig) as frames:
        await _next(frames)
        rig.live.load = InstanceLoad(instance="inst_0", epoch=Epoch(5), running=1, waiting=0, kv_used_tokens=9)
        rig.request("req_1", 1)
        frame = await _until(frames, "requests")
        assert (frame.requests[0].generated_tokens, frame.models[0].running) == (1, 1)
        assert [one.kv_used_tokens for one in frame.instances if one.id == "inst_0"] == [9]
        # The load is the instance's own word, and may come after the request has ended.
        rig.live.now.clear()
        assert (await _next(frames)).gone == {"requests": ("req_1",)}
        rig.live.load = None
        assert (await _until(frames, "instances")).instances[0].running == 0
    await rig.feed.close_feed()


async def test_a_reader_of_what_stands_still_hears_signs_of_life_while_other_things_change() -> None:
    rig, told = _Rig(idle_s=0.05), asyncio.Event()

    async def change() -> None:
        async with _reading(rig) as frames:
            for tokens in itertools.count(1):
                if told.is_set():
                    return
                rig.request("req_1", tokens)
                await _until(frames, "requests")

    changing = asyncio.create_task(change())
    quiet = rig.feed.read(None, frozenset({"operations"}))
    try:
        assert (await asyncio.wait_for(anext(quiet), 30)) is not None
        assert await asyncio.wait_for(anext(quiet), 5) is None
    finally:
        told.set()
        await changing
        await quiet.aclose()
        await rig.feed.close_feed()


async def test_placements_events_and_log_lines_are_told() -> None:
    rig = _Rig()
    async with _reading(rig) as frames:
        await _next(frames)
        rig.view.put_placement(PlacementRecord(_DIGEST, "node_1", Tier.DISK, 0, TierState.RESIDENT, 4096))
        placed = PutPlacement(_DIGEST, "node_1", Tier.DISK, 0, TierState.RESIDENT, 4096)
        rig.feed.committed([placed, _event(2)])
        rig.feed.handle(logging.LogRecord("sllmctl.serve", logging.WARNING, "", 1, "lost %s", ("it",), None))
        frame = await _next(frames)
        assert (frame.checkpoints[0].placements[0].size_bytes, frame.events) == (4096, (_event(2),))
        assert [(line.level, line.logger, line.message) for line in frame.logs] == [("warning", "sllmctl.serve", "lost it")]
    await rig.feed.close_feed()


async def test_a_reader_resumes_after_its_cursor_and_begins_anew_when_that_has_expired() -> None:
    rig = _Rig(gone=2)
    async with _reading(rig) as frames:
        cursor = (await _next(frames)).cursor
    rig.remove("inst_0")
    async with _reading(rig, cursor) as frames:
        frame = await _next(frames)
        while not frame.gone:
            frame = await _next(frames)
        assert (frame.fresh, frame.gone, frame.instances) == (False, {"instances": ("inst_0",)}, ())
        # As many things come and go as are remembered, and one more.
        for number in range(10, 13):
            rig.commit(rig.add_instance(f"inst_{number}"))
            assert (await _until(frames, "instances")).instances[0].id == f"inst_{number}"
            rig.remove(f"inst_{number}")
            assert (await _until(frames, "gone")).gone == {"instances": (f"inst_{number}",)}
    for expired in (cursor, "0badcafe-1", "nonsense", "-", f"{cursor}9999", cursor + "9" * 5000):
        async with _reading(rig, expired) as frames:
            assert (await _next(frames)).fresh, expired
    await rig.feed.close_feed()


async def test_a_slow_reader_gets_one_frame_for_all_that_happened() -> None:
    rig = _Rig()
    async with _reading(rig) as slow, _reading(rig) as quick:
        await _next(slow)
        await _next(quick)
        for tokens in range(1, 30):
            rig.request("req_1", tokens)
            assert (await _until(quick, "requests")).requests[0].generated_tokens == tokens
        assert [one.generated_tokens for one in (await _next(slow)).requests] == [29]
    await rig.feed.close_feed()


async def test_a_large_picture_comes_in_parts_and_only_the_last_may_be_resumed_from() -> None:
    rig = _Rig(count=25, part=10)
    async with _reading(rig) as frames:
        parts = [await _next(frames) for _ in range(3)]
        assert [(part.fresh, part.more, bool(part.cursor)) for part in parts] == [
            (True, True, False),
            (False, True, False),
            (False, False, True),
        ]
        assert sum(len(part.instances) for part in parts) == 25
    await rig.feed.close_feed()


async def test_readers_are_bounded_and_learn_of_the_end() -> None:
    rig = _Rig(readers=1)
    async with _reading(rig) as frames:
        await _next(frames)
        with pytest.raises(Overloaded, match="as many as may"):
            await anext(rig.feed.read(None, _ALL))
        await rig.feed.close_feed()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(frames), 60)
    with pytest.raises(Unreachable):
        await anext(rig.feed.read(None, _ALL))


async def test_without_a_reader_nothing_is_looked_at() -> None:
    rig = _Rig(linger_s=0.0)
    async with _reading(rig) as frames:
        await _next(frames)
        ticker = rig.feed._ticker
    assert ticker is not None
    await asyncio.wait_for(ticker, 60)
    looked = rig.live.asked_for
    rig.commit(rig.add_instance("inst_9"))
    assert not any(rig.feed._touched.values())
    async with _reading(rig) as frames:
        assert len((await _next(frames)).instances) == 3
    assert rig.live.asked_for > looked
    await rig.feed.close_feed()


class _Unspeakable:
    def __str__(self) -> str:
        raise AttributeError("no words")


def test_a_line_that_cannot_be_told_does_not_fail_who_logs_it(capsys: pytest.CaptureFixture[str]) -> None:
    rig = _Rig()
    rig.feed.handle(logging.LogRecord("x", logging.INFO, "", 1, "%s", (_Unspeakable(),), None))
    assert "no words" in capsys.readouterr().err
    assert not rig.feed._lines


async def test_when_it_cannot_be_kept_up_to_date_the_readers_begin_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = _Rig()
    async with _reading(rig) as frames:
        name = (await _next(frames)).cursor
        with monkeypatch.context() as broken:
            broken.setattr(rig.live, "moving", lambda: [][0])
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(anext(frames), 60)
    assert "cannot be kept up to date" in caplog.text
    rig.commit(rig.add_instance("inst_9"))
    assert not any(rig.feed._touched.values())
    async with _reading(rig, name) as frames:
        frame = await _next(frames)
        assert (frame.fresh, len(frame.instances)) == (True, 3)
    await rig.feed.close_feed()


async def test_a_reader_whose_picture_cannot_be_drawn_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = _Rig()
    with monkeypatch.context() as broken:
        broken.setattr(rig.live, "moving", lambda: [][0])
        with pytest.raises(IndexError):
            await anext(rig.feed.read(None, _ALL))
    assert rig.feed._picture is None
    async with _reading(rig) as frames:
        assert (await _next(frames)).fresh
    await rig.feed.close_feed()


async def test_closing_while_the_first_picture_is_drawn_is_told_to_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = _Rig()
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(*_: Any, **__: Any) -> list[EventView]:
        asked.set()
        await go_on.wait()
        return []

    monkeypatch.setattr(rig.live, "events", slowly)
    reading = asyncio.ensure_future(anext(rig.feed.read(None, _ALL)))
    await asyncio.wait_for(asked.wait(), 60)
    await rig.feed.close_feed()
    go_on.set()
    with pytest.raises(Unreachable, match="stopping"):
        await asyncio.wait_for(reading, 60)
    assert rig.feed._ticker is None


def test_a_picture_keeps_the_newest_events_and_says_what_was_left_out() -> None:
    picture = Picture("p", keep=3, gone=3)
    for number in range(3):
        picture.put("events", f"ev_{number}", _event(number))
    cursor = picture.cursor
    assert not picture.put("events", "ev_2", _event(2))
    for number in range(3, 5):
        picture.put("events", f"ev_{number}", _event(number))
    assert not picture.since(cursor, _ALL).gap
    picture.put("events", "ev_5", _event(5))
    picture.put("events", "ev_6", _event(6))
    news = picture.since(cursor, _ALL)
    assert news.gap
    assert [key.name for key, _ in news.entries] == ["ev_4", "ev_5", "ev_6"]
    assert not picture.since(cursor, frozenset({"nodes"})).entries


@contextlib.asynccontextmanager
async def _served(rig: _Rig) -> AsyncIterator[Path]:
    app = admin_app(runner=rig.live, view=rig.view, database=rig.live, router=rig.live, status=lambda: _STATUS, feed=rig.feed)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="sl") as directory:
        path = Path(directory) / "admin.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen()
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_config=None, loop="asyncio"))
            serving = asyncio.create_task(server._serve([listener]))
            try:
                yield path
            finally:
                await rig.feed.close_feed()
                server.should_exit = server.force_exit = True
                await serving


_PATIENCE = ClientSettings(connect_s=60.0, answer_s=60.0, silence_s=60.0)


async def test_the_async_client_follows_until_the_manager_stops() -> None:
    rig = _Rig(idle_s=0.01)
    async with _served(rig) as path, AsyncAdminClient(path, _PATIENCE) as admin:
        frames = admin.follow()
        first = await anext(frames)
        assert (first.fresh, len(first.instances)) == (True, 2)
        rig.request("req_1", 1)
        assert (await anext(frames)).requests[0].id == "req_1"
        await rig.feed.close_feed()
        with pytest.raises(Unreachable):
            await anext(frames)


async def test_the_sync_client_follows_the_kinds_that_it_names_and_resumes() -> None:
    rig = _Rig()

    def follow(path: Path) -> tuple[StreamFrame, StreamFrame]:
        with AdminClient(path, _PATIENCE) as admin:
            first = next(admin.follow(kinds=("instances",)))
            rig.remove("inst_0")
            return first, next(frame for frame in admin.follow(first.cursor, ("instances",)) if frame.gone)

    async with _served(rig) as path:
        first, second = await asyncio.to_thread(follow, path)
        assert (len(first.instances), first.models, first.nodes) == (2, (), ())
        assert (second.fresh, second.gone) == (False, {"instances": ("inst_0",)})
        async with AsyncAdminClient(path, _PATIENCE) as admin:
            with pytest.raises(InvalidInput, match="kinds"):
                await anext(admin.follow(kinds=("attic",)))  # type: ignore[arg-type]

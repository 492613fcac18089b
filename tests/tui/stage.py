"""A dashboard over a manager that says what a test has it say, on a clock that stands still."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace
from textual._context import active_app

from schema.admin import LogFrame, LogView, PinView, PlacementView, PublicationView, StreamFrame, StreamKind
from schema.errors import SllmError, Unreachable
from schema.states import Tier, TierState
from sllmctl.client import AsyncAdminClient, Call, LogQuery
from sllmctl.config import ClientSettings
from tests.sllmctl.fake_manager import (
    CHECKPOINTS,
    EVENTS,
    EXPLAINS,
    INSTANCES,
    MODELS,
    NODES,
    NOW,
    OPERATIONS,
    REQUESTS,
    STATUS,
)
from tui.app import Dashboard

WAIT_S = 60.0
__all__ = ["DIGEST", "FRAME", "Manager", "running", "screen", "settled", "until"]

DIGEST = CHECKPOINTS[0].digest
_CHECKPOINT = replace(
    CHECKPOINTS[0],
    placements=(
        *CHECKPOINTS[0].placements,
        PlacementView(node="gpu1", tier=Tier.DEVICE, state=TierState.RESIDENT, size_bytes=1_288_490_189, users=1),
        PlacementView(node="gpu1", tier=Tier.DISK, state=TierState.QUARANTINED, size_bytes=1_288_490_189, reason="a bad chunk"),
    ),
    pins=(PinView(node="local", tier=Tier.DISK),),
    publications=(PublicationView(url="s3://weights/qwen", layout="1", published_at=NOW - 900),),
)
FRAME = StreamFrame(
    cursor="p-1",
    at=NOW,
    fresh=True,
    status=replace(STATUS, api_url="http://127.0.0.1:8080"),
    nodes=(replace(NODES[0], device_used_bytes=(27 << 30,)), NODES[1]),
    models=MODELS,
    instances=INSTANCES,
    requests=REQUESTS,
    checkpoints=(_CHECKPOINT,),
    operations=OPERATIONS,
    events=EVENTS,
    logs=(LogView(id="log_1", at=NOW - 9, level="warning", logger="sllmctl.serve", message="node gpu1 is\x1b[31m lost"),),
)


class Manager:
    """``asked`` is every call as (method, path, body); ``answers`` are by path, else what the call reads of nothing is None."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes | None]] = []
        self.cursors: list[str | None] = []
        self.answers: dict[str, Any] = {"models/qwen/explain": EXPLAINS["qwen"]}
        self.up = True
        self.logs: asyncio.Queue[LogFrame | SllmError] = asyncio.Queue()
        self.followed: list[LogQuery] = []
        self._told: asyncio.Queue[StreamFrame | SllmError] = asyncio.Queue()
        self.tell(FRAME)

    def tell(self, frame: StreamFrame | SllmError) -> None:
        self._told.put_nowait(frame)

    def change(self, **what: Any) -> None:
        """Tell a change."""
        self.tell(StreamFrame(cursor="p-2", at=NOW, **what))

    def client(self) -> AsyncAdminClient:
        return _Client(self)


class _Client(AsyncAdminClient):
    def __init__(self, manager: Manager) -> None:
        super().__init__(Path("/nowhere"), ClientSettings())
        self._manager = manager

    async def follow(self, cursor: str | None = None, kinds: Sequence[StreamKind] = ()) -> AsyncGenerator[StreamFrame, None]:
        self._manager.cursors.append(cursor)
        while True:
            if not self._manager.up:
                raise Unreachable("no manager answers at /run/admin.sock; start it with `sllmctl serve`")
            told = await self._manager._told.get()
            if isinstance(told, SllmError):
                raise told
            yield told

    async def follow_logs(self, wanted: LogQuery) -> AsyncGenerator[LogFrame, None]:
        self._manager.followed.append(wanted)
        while True:
            told = await self._manager.logs.get()
            if isinstance(told, SllmError):
                raise told
            yield told

    async def ask(self, call: Call[Any]) -> Any:
        self._manager.asked.append((call.method, call.path, call.body))
        answer = self._manager.answers.get(call.path)
        if isinstance(answer, SllmError):
            raise answer
        return answer


@contextlib.asynccontextmanager
async def running(manager: Manager, size: tuple[int, int] = (100, 30), **options: Any) -> AsyncIterator[tuple[Dashboard, Any]]:
    """The application with its first picture drawn, and a pilot.

    Textual's pilot takes an application for idle when its process has had little time of a processor, which it also has where
    others have it all: here it waits until nothing is left to do. No message goes because its time is over, and nothing is
    drawn because a second has passed. It has its colours, whatever the tests' own terminal is to have.
    """
    with patch.dict(os.environ):
        os.environ.pop("NO_COLOR", None)
        app = Dashboard(manager.client, clock=lambda: NOW, **options)
    with (
        patch("textual.pilot.wait_for_idle", _still),
        patch("textual.app.wait_for_idle", _still),
        patch("textual.pilot.Pilot._wait_for_screen", _still),
        patch("textual.notifications.time", lambda: -math.inf),
        patch("tui.app._TICK_S", 3600.0),
    ):
        async with app.run_test(size=size, tooltips=False, notifications=True) as pilot:
            await settled(app, pilot)
            yield app, pilot


async def _still(*_: object) -> None:
    """Until no callback is ready to run, and the screen has drawn what it waits to draw."""
    ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
    drawn = False
    while not drawn:
        await asyncio.sleep(0)
        while ready:  # noqa: ASYNC110 - what is left in the loop has no event
            await asyncio.sleep(0)
        drawn = True
        if (app := active_app.get(None)) is not None and app.is_running and app.screen_stack:
            screen = app.screen
            drawn = not (screen._callbacks or screen._dirty_widgets or screen._layout_required or screen._repaint_required)
            screen._on_timer_update()


async def settled(app: Dashboard, pilot: Any) -> None:
    """Until what was told has been taken in and drawn, at the size that the terminal has."""
    await pilot.pause()
    await until(pilot, lambda: app._pending is None and app._resize_timer is None and app._resize_event is None)
    app._redraw()
    await pilot.pause()


async def until(pilot: Any, reached: Callable[[], object]) -> None:
    """Until something has come about; AssertionError if it does not within `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline, "never"
        await asyncio.sleep(0.01)
        await _still()


def screen(app: Dashboard) -> str:
    """The text of the screen, without trailing blanks."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)

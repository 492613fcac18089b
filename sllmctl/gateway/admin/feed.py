"""The admin API's event stream: keeps a picture of the cluster up to date while somebody reads it, and tells what is new.

What is durable is told by the rows that were committed, so that a change costs what changed and not the size of the cluster;
what only the router knows (requests, progress, loads) is looked at in turns, for what is live alone. Without a reader nothing
is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from schema.admin import EventView, InstanceView, LogView, RequestView, StatusView, StreamFrame, StreamKind
from schema.errors import Overloaded, Unreachable
from sllmctl.cluster import changes
from sllmctl.cluster.changes import RowChange
from sllmctl.cluster.view import ClusterView
from sllmctl.config import StreamSettings
from sllmctl.control.views import LiveNumbers, checkpoint_view, instance_view, model_view, node_view, operation_view
from sllmctl.gateway import story
from sllmctl.gateway.admin.picture import KINDS, Picture
from sllmctl.gateway.ports import EventsPort

__all__ = ["Feed", "LivePort"]

_log = logging.getLogger(__name__)

_AGAIN = 500
"""So many busy instances are looked at in one turn; the others in the next."""
_CURSOR_DIGITS = 20
_AT_ONCE = 250
"""So many things of a kind are looked at before tokens and others get the event loop again."""


class LivePort(LiveNumbers, Protocol):
    def requests(self) -> list[RequestView]: ...
    def moving(self) -> list[tuple[str, str]]: ...


class Feed(logging.Handler):
    """Told of rows by `committed`, of log lines as a handler of logging's. ``close_feed`` ends it and its readers."""

    def __init__(
        self,
        *,
        view: ClusterView,
        live: LivePort,
        database: EventsPort,
        status: Callable[[], StatusView],
        settings: StreamSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(logging.DEBUG)
        self.addFilter(lambda record: record.name != story.LOGGER)  # requests have a table of their own
        self._view, self._live, self._database, self._status = view, live, database, status
        self._settings, self._clock = settings, clock
        self._picture: Picture | None = None
        self._drawing = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._readers = 0
        self._left_at = 0.0
        self._closed = False
        self._touched: dict[StreamKind, dict[str, None]] = {kind: {} for kind in KINDS}
        self._events: deque[EventView] = deque(maxlen=settings.keep)
        self._busy: dict[str, None] = {}
        self._moving: list[tuple[str, str]] = []
        self._lines: deque[LogView] = deque(maxlen=settings.keep)
        self._line = itertools.count(1)

    # --- what is told to it

    def emit(self, record: logging.LogRecord) -> None:
        """A log line, from any thread."""
        try:
            message = record.getMessage()
        except Exception:  # whatever an argument's own __str__ raises; a line that cannot be told must not fail who logs it
            self.handleError(record)
            return
        self._lines.append(
            LogView(
                id=f"log_{next(self._line)}",
                at=record.created,
                level=record.levelname.lower(),
                logger=record.name,
                message=message,
            )
        )

    def committed(self, rows: Sequence[RowChange]) -> None:
        """Rows are durable: what they are of is looked at in the next turn."""
        self._events.extend(change for change in rows if isinstance(change, EventView))
        if self._picture is None:
            return
        for change in rows:
            match change:
                case changes.PutNode():
                    self._touch("nodes", change.id)
                case changes.PutInstance():
                    self._touch_instance(change.truth.instance, change.model, change.node)
                case changes.RemoveInstance():
                    shown: InstanceView | None = self._picture.views("instances").get(change.id)
                    if shown is not None:
                        node = self._view.node_named(shown.node)
                        self._touch_instance(change.id, shown.model, node.id if node is not None else "")
                case EventView(kind="model", object=name):
                    self._touch("models", name)
                case changes.PutModel():
                    self._touch("models", change.spec.name)
                    if change.digest is not None:
                        self._touch("checkpoints", change.digest)
                case changes.RemoveModelRow():
                    self._touch("models", change.name)
                    self._touched["checkpoints"].update(dict.fromkeys(self._view.checkpoints))
                case changes.PutPlacement() | changes.RemovePlacement() | changes.PutPin() | changes.RemovePin():
                    self._touch("checkpoints", change.digest)
                    self._touch("nodes", change.node)
                case (
                    changes.PutCheckpoint()
                    | changes.RemoveCheckpointRow()
                    | changes.PutPublication()
                    | changes.RemovePublication()
                ):
                    self._touch("checkpoints", change.digest)

    def _touch(self, kind: StreamKind, name: str) -> None:
        self._touched[kind][name] = None

    def _touch_instance(self, instance: str, model: str, node: str) -> None:
        self._touch("instances", instance)
        self._touch("models", model)
        self._touch("nodes", node)

    # --- what it tells

    async def read(self, cursor: str | None, kinds: frozenset[StreamKind]) -> AsyncGenerator[StreamFrame | None, None]:
        """Frames from ``cursor`` on, the first at once; None is a sign of life. Ends with `close_feed`, and when the picture
        cannot be kept up to date: whoever then reads again gets a fresh one.

        Raises Overloaded when too many read, Unreachable when the manager is stopping.
        """
        self._check_open()
        if self._readers >= self._settings.readers:
            raise Overloaded(f"{self._readers} readers follow the event stream, as many as may (admin.stream.readers)", 5.0)
        self._readers += 1
        loop = asyncio.get_running_loop()
        try:
            picture = await self._drawn()
            place, told_at = _place(cursor, picture), loop.time()
            shown: StatusView | None = None
            while not self._closed and picture is self._picture:
                news, status, wake = picture.since(place, kinds), self._status(), self._news
                if news.entries or news.fresh or news.gap or status != shown:
                    for frame in news.frames(picture.name, self._clock(), self._settings.part):
                        yield frame if frame.more or status == shown else replace(frame, status=status)
                    place, shown, told_at = news.cursor, status, loop.time()
                else:
                    place = news.cursor
                    # Counted from what was told last: what wakes it may all be of kinds that this reader does not want.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(told_at + self._settings.idle_s):
                            await wake.wait()
                        continue
                    yield None
                    told_at = loop.time()
        finally:
            self._readers -= 1
            self._left_at = loop.time()

    async def close_feed(self) -> None:
        """End all readers, and the work for them; one whose picture is just being drawn is told that it ends."""
        self._closed = True
        self._wake()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    # --- keeping the picture up to date

    def _check_open(self) -> None:
        if self._closed:
            raise Unreachable("the manager is stopping; try again when it serves")

    async def _drawn(self) -> Picture:
        """The picture, made anew unless there is one. Raises Unreachable when the feed was closed meanwhile."""
        async with self._drawing:
            self._check_open()
            if self._picture is not None:
                return self._picture
            picture = Picture(secrets.token_hex(4), keep=self._settings.keep, gone=self._settings.gone)
            self._events.clear()
            for event in await self._database.events(limit=self._settings.keep):
                picture.put("events", event.id, event)
            # From here on `committed` marks what changes, so no change can fall between the picture and its first turn.
            self._picture, self._busy, self._moving = picture, {}, []
            try:
                await self._draw(picture)
                self._check_open()
            except BaseException:
                self._forget()
                raise
            self._ticker = asyncio.create_task(self._tick(picture), name="event stream")
            return picture

    async def _draw(self, picture: Picture) -> None:
        view = self._view
        everything: tuple[tuple[StreamKind, Iterable[str]], ...] = (
            ("nodes", view.nodes),
            ("checkpoints", view.checkpoints),
            ("models", view.models),
            ("instances", view.instances),
        )
        for kind, names in everything:
            self._touched[kind] = dict.fromkeys(names)
        await self._look_at_all(picture)

    async def _tick(self, picture: Picture) -> None:
        """Keep the picture up to date for as long as somebody reads it; then, or when that fails, it is no more."""
        loop = asyncio.get_running_loop()
        try:
            while self._readers or loop.time() - self._left_at < self._settings.linger_s:
                await asyncio.sleep(self._settings.every_s)
                before = picture.cursor
                await self._look_at_all(picture)
                if picture.cursor != before:
                    self._wake()
        except Exception:
            _log.exception("the event stream cannot be kept up to date; its readers begin anew")
        finally:
            self._forget()

    def _forget(self) -> None:
        """There is no picture any more, and nothing is noted for one; its readers end."""
        self._picture = None
        for touched in self._touched.values():
            touched.clear()
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _look_at_all(self, picture: Picture) -> None:
        """One turn: what is live, and what was touched, a part at a time."""
        self._look_at_live(picture)
        self._look(picture)
        while any(self._touched.values()):
            await asyncio.sleep(0)
            self._look(picture)

    def _look_at_live(self, picture: Picture) -> None:
        self._look_at_requests(picture)
        moving = self._live.moving()
        for op, where in {*moving, *self._moving}:
            self._touch("nodes", where)
            if op in self._view.instances:
                self._touch("instances", op)
            elif (ingested := self._view.model_of_op(op)) is not None:
                self._touch("models", ingested.name)
        self._moving = moving
        for busy in list(itertools.islice(self._busy, _AGAIN)):
            del self._busy[busy]
            self._touch("instances", busy)
        for operation in self._view.operations.values():
            picture.put("operations", operation.id, operation_view(self._view, self._live, operation))
        for name in [name for name in picture.views("operations") if name not in self._view.operations]:
            picture.drop("operations", name)
        while self._events:
            event = self._events.popleft()
            picture.put("events", event.id, event)
        known = picture.views("logs")
        for line in list(self._lines):
            if line.id not in known:
                picture.put("logs", line.id, line)

    def _look(self, picture: Picture) -> None:
        """Some of what was touched."""
        view, live = self._view, self._live
        for name in _taken(self._touched["instances"]):
            instance = view.instances.get(name)
            if instance is None:
                picture.drop("instances", name)
                continue
            shown = instance_view(view, live, instance)
            picture.put("instances", name, shown)
            if shown.running or shown.kv_used_tokens:
                self._busy[name] = None
        for name in _taken(self._touched["models"]):
            model = view.models.get(name)
            _show(picture, "models", name, model and model_view(view, live, model))
        for name in _taken(self._touched["nodes"]):
            node = view.nodes.get(name)
            _show(picture, "nodes", name, node and node_view(view, live, node))
        for name in _taken(self._touched["checkpoints"]):
            checkpoint = view.checkpoints.get(name)
            _show(picture, "checkpoints", name, checkpoint and checkpoint_view(view, checkpoint))

    def _look_at_requests(self, picture: Picture) -> None:
        known = picture.views("requests")
        now = {request.id: request for request in self._live.requests()}
        for name in [name for name in known if name not in now]:
            picture.drop("requests", name)
        for name, request in now.items():
            before: RequestView | None = known.get(name)
            if before is not request and picture.put("requests", name, request):
                self._touch("models", request.model)
                for instance in {request.instance, before.instance if before is not None else None} - {None}:
                    assert instance is not None
                    self._touch("instances", instance)


def _place(cursor: str | None, picture: Picture) -> int | None:
    """The number in a cursor of this picture, else None: a reader with one that means nothing any more begins anew."""
    name, _, number = (cursor or "").partition("-")
    if name != picture.name or not (number.isascii() and number.isdigit()) or len(number) > _CURSOR_DIGITS:
        return None
    return int(number)


def _show(picture: Picture, kind: StreamKind, name: str, view: object | None) -> None:
    if view is None:
        picture.drop(kind, name)
    else:
        picture.put(kind, name, view)


def _taken(touched: dict[str, None]) -> list[str]:
    names = list(itertools.islice(touched, _AT_ONCE))
    for name in names:
        del touched[name]
    return names

"""``GET models/{name}/logs``, ``instances/{id}/logs`` and ``nodes/{name}/logs``: what workers and the processes of nodes wrote.

The lines lie on the nodes, in files that outlive their writers, and are asked for over the links, a page at a time. ``tail`` is
how many of the last lines of each source to begin with, ``since`` how many seconds old they are at most; with ``follow=1`` what
is written from then on comes as server-sent events. ``instance`` and ``process`` narrow a model's and a node's logs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from schema.admin import LogFrame, LogLineView
from schema.errors import NotFound, Overloaded, SllmError, TimedOut, Unreachable
from schema.link import LogChunk, ReadLog
from schema.states import NodeState
from sllmctl.cluster.view import ClusterView
from sllmctl.config import LogSettings
from sllmctl.gateway.admin.answers import (
    Flag,
    Routes,
    json_answer,
    known,
    read_count,
    read_flag,
    read_number,
    read_query,
)
from sllmctl.gateway.openapi import Query, operation

__all__ = ["Logs", "LogsPort"]

H = TypeVar("H", bound=Callable[..., Any])
_TAIL = 100
_TAIL_LIMIT = 100_000
_ALIVE = b": alive\n\n"
_encode = msgspec.json.Encoder().encode


def _operation(summary: str, *more: Query) -> Callable[[H], H]:
    """Say of a handler that it answers with lines, or streams them."""
    return operation(
        summary,
        LogFrame,
        events=LogFrame,
        query=(
            Query(
                "tail",
                Annotated[int, Meta(ge=0, le=_TAIL_LIMIT)],
                f"Last lines of each source to begin with; {_TAIL} if not given.",
            ),
            Query("since", Annotated[float, Meta(ge=0)], "How many seconds old they are at most; 0 is any age."),
            Query("follow", Flag, "1: go on with what is written from then on, as server-sent events."),
            *more,
        ),
        errors=(NotFound, Overloaded, TimedOut, Unreachable),
    )


class LogsPort(Protocol):
    """The links, as far as logs are read over them."""

    def is_up(self, node: str) -> bool: ...

    async def read_log(self, node: str, wanted: ReadLog) -> LogChunk:
        """A page. Raises what the node says, Unreachable, TimedOut."""


class _Reader:
    """One node's part of what was asked for; ``at`` is the time of the last line that said one, by source."""

    def __init__(self, links: LogsPort, node: str, name: str, wanted: ReadLog) -> None:
        self.node, self.name = node, name
        self._links, self._wanted = links, wanted
        self._at: dict[str, float] = {}

    async def page(self) -> tuple[list[tuple[float, LogLineView]], bool]:
        """The next lines with when they count as written, and whether more are there."""
        chunk = await self._links.read_log(self.node, self._wanted)
        self._wanted = replace(self._wanted, cursors=chunk.cursors)
        found = []
        for line in chunk.lines:
            if line.at is not None:
                self._at[line.source] = line.at
            view = LogLineView(node=self.name, source=line.source, at=line.at, text=line.text)
            found.append((self._at.get(line.source, 0.0), view))
        return found, chunk.more


class Logs:
    """The routes. ``closing`` ends those who follow."""

    def __init__(self, view: ClusterView, links: LogsPort, settings: LogSettings) -> None:
        self._view, self._links, self._settings = view, links, settings
        self._followers = 0
        self._closing = False

    def routes(self) -> Routes:
        return {
            ("GET", "models/{name}/logs"): self.of_model,
            ("GET", "instances/{id}/logs"): self.of_instance,
            ("GET", "nodes/{name}/logs"): self.of_node,
        }

    def close(self) -> None:
        self._closing = True

    @_operation("What the workers of a model's instances wrote.", Query("instance", str, "Of this instance alone."))
    async def of_model(self, request: Request) -> Response:
        name, query = request.path_params["name"], read_query(request)
        wanted = ReadLog(op="", model=name, instance=query.get("instance", ""))
        return await self._answer(query, wanted, self._nodes(), self._missing("model", name, self._view.models))

    @_operation("What an instance's workers wrote, also when it is gone.")
    async def of_instance(self, request: Request) -> Response:
        name, query = request.path_params["id"], read_query(request)
        instance = self._view.instances.get(name)
        nodes = self._nodes() if instance is None else [instance.node]
        missing = self._missing("instance", name, self._view.instances)
        return await self._answer(query, ReadLog(op="", instance=name), nodes, missing)

    @_operation(
        "What a process of a node wrote.", Query("process", str, "agent (if not given), store, zygote, ingest, publish.")
    )
    async def of_node(self, request: Request) -> Response:
        name, query = request.path_params["name"], read_query(request)
        node = known("node", name, self._view.node_named(name) or self._view.nodes.get(name))
        return await self._answer(query, ReadLog(op="", process=query.get("process", "agent")), [node.id], None)

    def _nodes(self) -> list[str]:
        return [node.id for node in self._view.nodes.values() if node.state is not NodeState.REMOVED]

    def _missing(self, kind: str, name: str, there: object) -> SllmError | None:
        """What to raise for something unknown of which no node has a line."""
        assert isinstance(there, dict)
        return None if name in there else NotFound(f"there is no {kind} {name!r}, and no node has a log of it")

    async def _answer(
        self, query: dict[str, str], wanted: ReadLog, nodes: Sequence[str], missing: SllmError | None
    ) -> Response:
        tail = read_count(query, "tail", _TAIL, 0, _TAIL_LIMIT)
        follow = read_flag(query, "follow")
        wanted = replace(wanted, tail=tail, newer_s=read_number(query, "since", 0.0))
        if not any(map(self._links.is_up, nodes)):
            raise Unreachable("no node that may have these logs is linked; `sllmctl node ls` shows why")
        readers = [_Reader(self._links, node, self._view.nodes[node].name, wanted) for node in nodes]
        lines, lost = await self._pages(readers)
        if not lines and len(lost) == len(readers):
            unanswered = (error for error in lost.values() if not isinstance(error, NotFound))
            raise next(unanswered, missing or NotFound(f"no node has a log of instance {wanted.instance}"))
        if not lines and missing is not None:
            raise missing
        if not follow:
            return json_answer(LogFrame(items=tuple(lines), lost=_told(lost)))
        if self._followers >= self._settings.followers:
            raise Overloaded(f"{self._followers} follow logs, as many as may (admin.logs.followers)", 5.0)
        events = self._events(readers, lines)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _pages(self, readers: Sequence[_Reader]) -> tuple[list[LogLineView], dict[str, SllmError]]:
        """All that is there to read, in order of time, and the nodes that could not give theirs."""
        lost: dict[str, SllmError] = {}

        async def read(reader: _Reader) -> list[tuple[float, LogLineView]]:
            found: list[tuple[float, LogLineView]] = []
            try:
                more = True
                while more and len(found) < _TAIL_LIMIT:
                    page, more = await reader.page()
                    found += page
            except SllmError as error:  # one node's broken disk hides no other's lines
                lost[reader.name] = error
            return found

        timed = [line for lines in await asyncio.gather(*map(read, readers)) for line in lines]
        timed.sort(key=lambda line: line[0])
        return [line for _, line in timed], lost

    async def _events(self, readers: Sequence[_Reader], lines: list[LogLineView]) -> AsyncIterator[bytes]:
        self._followers += 1
        try:
            told_at, shown = time.monotonic(), dict[str, str]()
            yield _event(LogFrame(items=tuple(lines)))
            while not self._closing:
                await asyncio.sleep(self._settings.every_s)
                lines, lost = await self._pages(readers)
                why = _told(lost)
                if lines or why != shown:
                    told_at, shown = time.monotonic(), why
                    yield _event(LogFrame(items=tuple(lines), lost=why))
                elif time.monotonic() - told_at >= self._settings.idle_s:
                    told_at = time.monotonic()
                    yield _ALIVE
        finally:
            self._followers -= 1


def _told(lost: dict[str, SllmError]) -> dict[str, str]:
    """Why lines may be missing. A node that has no such log has said all that it could."""
    return {name: str(error) for name, error in lost.items() if not isinstance(error, NotFound)}


def _event(frame: LogFrame) -> bytes:
    return b"data: %b\n\n" % _encode(frame)

"""The live model: the cluster as the event stream tells it, and the task that follows that stream and takes it up again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from schema.admin import (
    CheckpointView,
    EventView,
    ExplainView,
    InstanceView,
    LogView,
    ModelView,
    NodeView,
    OperationView,
    RequestView,
    StatusView,
    StreamFrame,
)
from schema.errors import SllmError
from sllmctl.client import AsyncAdminClient

__all__ = ["Cluster", "Follower"]

_NAMES = {
    "nodes": "id",
    "models": "name",
    "instances": "id",
    "requests": "id",
    "checkpoints": "digest",
    "operations": "id",
    "events": "id",
    "logs": "id",
}
_KEEP = 1000
_HISTORY = 60
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 5.0


class Cluster:
    """Things by key and kind, as they were last told.

    ``lost`` says why nothing is told any more: what is here is then the last picture, right at ``told_at`` (our clock).
    ``tokens`` is the history of tokens per second by node's name, a sample for each `sample`. ``explained`` is what was last
    asked for.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.status: StatusView | None = None
        self.nodes: dict[str, NodeView] = {}
        self.models: dict[str, ModelView] = {}
        self.instances: dict[str, InstanceView] = {}
        self.requests: dict[str, RequestView] = {}
        self.checkpoints: dict[str, CheckpointView] = {}
        self.operations: dict[str, OperationView] = {}
        self.events: dict[str, EventView] = {}
        self.logs: dict[str, LogView] = {}
        self.explained: ExplainView | None = None
        self.cursor: str | None = None
        self.lost: str | None = "connecting"
        self.told_at = 0.0
        self.tokens: dict[str, deque[float]] = {}
        self._skew_s = 0.0
        self._coming: dict[str, dict[str, Any]] | None = None
        self._fresh_tokens: dict[str, int] = {}
        self._sampled_at: float | None = None

    def now(self) -> float:
        """The manager's clock, which ages are reckoned by; it stands while the picture is stale."""
        return (self.told_at if self.lost is not None and self.told_at else self._clock()) + self._skew_s

    def stale_s(self) -> float:
        """How old the picture is, once it is told no more."""
        return self._clock() - self.told_at

    @property
    def waiting(self) -> int:
        return sum(model.waiting for model in self.models.values())

    @property
    def running(self) -> int:
        return sum(model.running for model in self.models.values())

    def apply(self, frame: StreamFrame) -> None:
        """Take a frame in. A fresh picture replaces the last one when all of it is here, never in parts."""
        if frame.fresh:
            self._coming = {kind: {} for kind in _NAMES}
        for kind, name in _NAMES.items():
            shelf: dict[str, Any] = getattr(self, kind) if self._coming is None else self._coming[kind]
            if kind == "requests" and self._coming is None:
                self._count(frame.requests)
            for view in getattr(frame, kind):
                shelf[getattr(view, name)] = view
            for gone in frame.gone.get(kind, ()):  # type: ignore[call-overload]
                shelf.pop(gone, None)
            if kind in ("events", "logs"):
                while len(shelf) > _KEEP:
                    del shelf[next(iter(shelf))]
        if frame.status is not None:
            self.status = frame.status
        if not frame.more:
            if self._coming is not None:
                for kind, coming in self._coming.items():
                    setattr(self, kind, coming)
                self._coming = None
            self.cursor = frame.cursor
        self.lost = None
        self.told_at = self._clock()
        self._skew_s = frame.at - self.told_at

    def lose(self, why: str) -> None:
        """Nothing is told any more; a picture that was not here in whole never comes. Until now it was right, however long ago
        something in it changed."""
        if self.lost is None:
            self.told_at = self._clock()
        self.lost = why
        self._coming = None

    def sample(self) -> None:
        """Add one sample to the histories: tokens per second since the last one. A node that is gone has none."""
        now = self._clock()
        there = {node.name for node in self.nodes.values()}
        for name in self.tokens.keys() - there:
            del self.tokens[name]
        elapsed_s = now - self._sampled_at if self._sampled_at is not None else 0.0
        if elapsed_s > 0:
            for name in there:
                samples = self.tokens.setdefault(name, deque(maxlen=_HISTORY))
                samples.append(self._fresh_tokens.get(name, 0) / elapsed_s)
        self._fresh_tokens.clear()
        self._sampled_at = now

    def tokens_per_s(self) -> float:
        return sum(samples[-1] for samples in self.tokens.values() if samples)

    def _count(self, requests: tuple[RequestView, ...]) -> None:
        for request in requests:
            before = self.requests.get(request.id)
            instance = self.instances.get(request.instance or "")
            if instance is not None:
                new = request.generated_tokens - (before.generated_tokens if before is not None else 0)
                self._fresh_tokens[instance.node] = self._fresh_tokens.get(instance.node, 0) + max(0, new)


class Follower:
    """Follows the stream into ``cluster`` for ever; ``changed`` is called after each frame, and when the manager went away."""

    def __init__(self, connect: Callable[[], AsyncAdminClient], cluster: Cluster, changed: Callable[[], None]) -> None:
        self._connect, self._cluster, self._changed = connect, cluster, changed

    async def run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                async with self._connect() as admin, contextlib.aclosing(admin.follow(self._cluster.cursor)) as frames:
                    async for frame in frames:
                        self._cluster.apply(frame)
                        self._changed()
                        wait_s = _FIRST_WAIT_S
            except SllmError as error:
                self._cluster.lose(str(error))
                self._changed()
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, wait_s * 2)

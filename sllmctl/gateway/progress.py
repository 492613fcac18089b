"""How far operations and starts have come, as nodes report it: the last word of each, and its rate."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from schema.admin import ProgressView
from schema.link import Progress
from schema.states import Tier

__all__ = ["ProgressBoard"]

_NOW_S = 3.0
"""What a rate of now is taken over, and longer where the steps are farther apart: they come in bursts, as chunks of several
connections do that end together, and between two of a burst nearly no time goes by."""
_SILENT_S = 30.0
"""What has said nothing for so long is not taken for a load any more."""


@dataclass(slots=True)
class _Stage:
    stage: str
    began_at: float
    began_bytes: int
    done_bytes: int
    total_bytes: int
    at: float
    node: str
    source: Tier | None
    steps: deque[tuple[float, int]] = field(default_factory=deque)
    """When it had how many bytes: the steps of the last `_NOW_S` and one before those, from which on they are counted."""

    def step(self, now: float, done_bytes: int) -> None:
        self.at, self.done_bytes = now, done_bytes
        self.steps.append((now, done_bytes))
        while len(self.steps) > 2 and now - self.steps[1][0] >= _NOW_S:
            self.steps.popleft()

    @property
    def now_bps(self) -> float:
        began_at, began_bytes = self.steps[0]
        return (self.done_bytes - began_bytes) / (self.at - began_at) if self.at > began_at else 0.0


class ProgressBoard:
    """Keeps the latest ``limit`` of them; an ended one is simply not asked for any more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stages: OrderedDict[str, _Stage] = OrderedDict()

    def take(self, progress: Progress, now: float, node: str = "") -> None:
        stage = self._stages.get(progress.op)
        done_bytes, total_bytes = progress.done_bytes, progress.total_bytes
        if stage is None or stage.stage != progress.stage or done_bytes < stage.done_bytes:
            stage = _Stage(progress.stage, now, done_bytes, done_bytes, total_bytes, now, node, progress.source)
            self._stages[progress.op] = stage
        stage.node, stage.source, stage.total_bytes = node, progress.source, total_bytes
        stage.step(now, done_bytes)
        self._stages.move_to_end(progress.op)
        if len(self._stages) > self._limit:
            self._stages.popitem(last=False)

    def drop(self, op: str) -> None:
        self._stages.pop(op, None)

    def view(self, op: str) -> ProgressView | None:
        stage = self._stages.get(op)
        if stage is None:
            return None
        return _view(stage)

    def moving(self, now: float) -> list[tuple[str, str]]:
        """(operation or instance, node) of all that moves bytes now; by `on`'s rule."""
        return [
            (op, stage.node)
            for op, stage in self._stages.items()
            if now - stage.at <= _SILENT_S and stage.done_bytes < stage.total_bytes
        ]

    def on(self, node: str, now: float) -> list[tuple[str, ProgressView]]:
        """What has moved bytes on a node lately and has not all of them yet; that which spoke last comes last."""
        return [
            (op, _view(stage))
            for op, stage in self._stages.items()
            if stage.node == node and now - stage.at <= _SILENT_S and stage.done_bytes < stage.total_bytes
        ]


def _view(stage: _Stage) -> ProgressView:
    elapsed = stage.at - stage.began_at
    rate = (stage.done_bytes - stage.began_bytes) / elapsed if elapsed > 0 else 0.0
    return ProgressView(
        stage=stage.stage,
        done_bytes=stage.done_bytes,
        total_bytes=stage.total_bytes,
        rate_bps=rate,
        source=stage.source,
        now_bps=stage.now_bps,
    )

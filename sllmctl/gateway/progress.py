"""How far operations and starts have come, as nodes report it: the last word of each, and its rate."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from schema.admin import ProgressView
from schema.link import Progress

__all__ = ["ProgressBoard"]


@dataclass(slots=True)
class _Stage:
    stage: str
    began_at: float
    began_bytes: int
    done_bytes: int
    total_bytes: int
    at: float


class ProgressBoard:
    """Keeps the latest ``limit`` of them; an ended one is simply not asked for any more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stages: OrderedDict[str, _Stage] = OrderedDict()

    def take(self, progress: Progress, now: float) -> None:
        stage = self._stages.get(progress.op)
        if stage is None or stage.stage != progress.stage or progress.done_bytes < stage.done_bytes:
            stage = _Stage(progress.stage, now, progress.done_bytes, progress.done_bytes, progress.total_bytes, now)
            self._stages[progress.op] = stage
        stage.done_bytes, stage.total_bytes, stage.at = progress.done_bytes, progress.total_bytes, now
        self._stages.move_to_end(progress.op)
        if len(self._stages) > self._limit:
            self._stages.popitem(last=False)

    def drop(self, op: str) -> None:
        self._stages.pop(op, None)

    def view(self, op: str) -> ProgressView | None:
        stage = self._stages.get(op)
        if stage is None:
            return None
        elapsed = stage.at - stage.began_at
        rate = (stage.done_bytes - stage.began_bytes) / elapsed if elapsed > 0 else 0.0
        return ProgressView(stage=stage.stage, done_bytes=stage.done_bytes, total_bytes=stage.total_bytes, rate_bps=rate)

"""What was decided lately, for those who ask why: a bounded log, oldest first."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from sllmctl.cluster.plans import Decision, Plan, kind_of

__all__ = ["Decisions", "Made"]


@dataclass(frozen=True, slots=True)
class Made:
    """A decision: when, for whom, how many requests waited, and the instance that it made, if it made one."""

    at: float
    model: str
    instance: str | None
    waiting: int
    decision: Decision


class Decisions:
    """The latest ``keep`` decisions, and how many of each kind there were (``counts``). A wait or refusal of a model is not
    repeated while the next one is of the same kind and, for a refusal, the same reason: a model that waits is looked at again
    and again."""

    def __init__(self, keep: int) -> None:
        self.counts: Counter[str] = Counter()
        self._made: deque[Made] = deque(maxlen=keep)
        self._last: dict[str, tuple[type[Decision], str]] = {}

    @property
    def maxlen(self) -> int | None:
        return self._made.maxlen

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Made]:
        return iter(self._made)

    def add(self, at: float, model: str, instance: str | None, waiting: int, decision: Decision) -> None:
        if isinstance(decision, Plan):
            self._last.pop(model, None)
        else:
            best = getattr(decision, "best", None)
            what = (type(decision), decision.reason if best is None else best.node)
            if self._last.get(model) == what:
                return
            self._last[model] = what
        self.counts[kind_of(decision)] += 1
        self._made.append(Made(at, model, instance, waiting, decision))

    def forget(self, model: str) -> None:
        """A model that is gone starts anew if one of its name comes."""
        self._last.pop(model, None)

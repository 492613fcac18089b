"""Requests that their clients may ask for again: found by their Idempotency-Key while they run, and for a while after.

Nodes keep the end of every sequence until it is acknowledged; for these requests that is done when they are forgotten here, so
that a restarted manager finds them again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from schema.ids import Epoch
from schema.link import RetryKey
from sllmctl.gateway.errors import KeyReused
from sllmctl.gateway.journal import Request, Timer
from sllmctl.gateway.queues import CallLater
from sllmctl.gateway.router_settings import RouterSettings

__all__ = ["End", "Retries"]

End = tuple[str, Epoch]
"""A node, and an attempt whose end it keeps."""


@dataclass(slots=True)
class _Entry:
    """``size_tokens`` of one that has ended, 0 before."""

    request: Request
    ends: list[End] = field(default_factory=list)
    size_tokens: int = 0
    timer: Timer | None = None


class Retries:
    """All of them that run, and as many of those that finished as the settings allow; the oldest are forgotten first.

    ``release`` is told of the ends that nodes need not keep any more.
    """

    def __init__(self, settings: RouterSettings, call_later: CallLater, release: Callable[[list[End]], None]) -> None:
        self._settings = settings
        self._call_later = call_later
        self._release = release
        self._entries: dict[str, _Entry] = {}
        self._finished: OrderedDict[str, _Entry] = OrderedDict()
        self._finished_tokens = 0
        self._held: dict[Epoch, str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, retry: RetryKey) -> Request | None:
        """The request of a key. Raises KeyReused when something else was asked with it."""
        entry = self._entries.get(retry.key)
        if entry is None:
            return None
        if entry.request.retry != retry:
            raise KeyReused(
                "this Idempotency-Key was used with another request, or its model has changed since: use a new key",
                "Idempotency-Key",
            )
        return entry.request

    def add(self, request: Request) -> None:
        """Remember a request, which has a key that is not known."""
        assert request.retry is not None
        self._entries[request.retry.key] = _Entry(request)

    def holds(self, attempt: Epoch) -> bool:
        """Whether the end of an attempt is not to be acknowledged yet."""
        return attempt in self._held

    def hold(self, request: Request, node: str, attempt: Epoch) -> bool:
        """Leave an end to be kept by its node, if a retry may come for the request; the request may just have ended with it."""
        entry = self._entry(request)
        if entry is None:
            return False
        assert request.retry is not None
        entry.ends.append((node, attempt))
        self._held[attempt] = request.retry.key
        return True

    def ended(self, request: Request) -> None:
        """Keep what a request gave; one that failed or was cancelled is forgotten, so that a retry runs anew."""
        entry = self._entry(request)
        if entry is None:
            return
        assert request.retry is not None
        key = request.retry.key
        if request.cancelled or request.failure is not None or not self._settings.replies_kept_s:
            self._forget(key)
            return
        entry.size_tokens = request.size_tokens
        entry.timer = self._call_later(self._settings.replies_kept_s, lambda: self._forget(key))
        self._finished[key] = entry
        self._finished_tokens += entry.size_tokens
        while len(self._finished) > self._settings.replies_kept or self._finished_tokens > self._settings.replies_kept_tokens:
            self._forget(next(iter(self._finished)))

    def _entry(self, request: Request) -> _Entry | None:
        entry = None if request.retry is None else self._entries.get(request.retry.key)
        return entry if entry is not None and entry.request is request else None

    def _forget(self, key: str) -> None:
        entry = self._entries.pop(key)
        self._finished.pop(key, None)
        self._finished_tokens -= entry.size_tokens
        if entry.timer is not None:
            entry.timer.cancel()
        for _, attempt in entry.ends:
            del self._held[attempt]
        self._release(entry.ends)

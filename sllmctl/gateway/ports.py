"""What the HTTP side needs of the router and of the text assets, as protocols, so that it imports neither."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from pathlib import Path
from typing import Protocol

from schema.admin import EventView, RequestTimeline
from schema.checkpoint import Manifest
from schema.errors import SllmError
from schema.link import RetryKey, SamplingParams
from schema.spec import ModelSpec
from schema.states import EndReason, ModelState

__all__ = ["AssetsPort", "EventsPort", "RequestPort", "RoutedModelPort", "RouterPort", "SequencePort", "TextAssetsPort"]


class RoutedModelPort(Protocol):
    """A model as it is routed now."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def state(self) -> ModelState: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def max_context_tokens(self) -> int: ...


class SequencePort(Protocol):
    """A sequence's journal, pulled: ``tokens`` only grows, ``finish`` is set once, after its last token. ``logprobs`` has a
    record for each token where they were asked for, ``cached_tokens`` how many were in the prefix cache, once that is known."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def logprobs(self) -> bytearray: ...
    @property
    def finish(self) -> EndReason | None: ...
    @property
    def cached_tokens(self) -> int | None: ...

    def complete(self) -> None:
        """No more of it is wanted: it ends as it stands, and its request goes on. After its end it does nothing."""

    async def wait(self, position: int) -> None:
        """Return once there are more than ``position`` tokens or an end; raise the SllmError of a failed request."""


class RequestPort(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def received_at(self) -> float: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def sequences(self) -> AbstractSequence[SequencePort]: ...

    def timeline(self) -> RequestTimeline: ...

    def leave(self, error: SllmError | None = None) -> None:
        """Read no more of it; said once. It ends with that, unless others read it or a retry may come; with an ``error``, for
        which nobody can read it, it ends in any case."""


class RouterPort(Protocol):
    def model(self, name: str) -> RoutedModelPort:
        """The model of this name. Raises NotFound."""

    def models(self) -> AbstractSequence[RoutedModelPort]: ...

    def submit(
        self,
        model: str,
        prompt: tuple[int, ...],
        params: SamplingParams,
        choices: int = 1,
        tenant: str = "",
        retry: RetryKey | None = None,
        request_id: str = "",
    ) -> RequestPort:
        """Take a request in, by the id that its client gave it if that can be. Raises NotFound, Conflict, InvalidInput,
        ContextOverflow, Overloaded."""

    def join(self, retry: RetryKey) -> RequestPort | None:
        """The request that a retry is of, None if it is none. Raises KeyReused."""


class TextAssetsPort(Protocol):
    @property
    def manifest(self) -> Manifest: ...
    @property
    def directory(self) -> Path: ...


class AssetsPort(Protocol):
    async def get(self, digest: str, timeout_s: float) -> TextAssetsPort:
        """The text assets of a checkpoint, once they are here. Raises TimedOut, Unschedulable."""


class EventsPort(Protocol):
    """The database, as far as events are read from it."""

    async def events(
        self,
        kind: str | None = None,
        object: str | None = None,  # noqa: A002 - the name that an event has it by
        limit: int = 100,
        after: str | None = None,
    ) -> list[EventView]: ...

"""What a worker must be able to say again: every attempt with its new tokens and its end, until that end is acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from agent.engine.api import StepOutput
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import AttemptTruth, Ended, Submit, TokenRun, Tokens
from schema.states import EndReason

__all__ = ["Journal"]

_MAX_FRAME_BYTES: Final = 8 << 20
"""About so much of new tokens goes into one frame; what is left stays fresh."""
_TOKEN_BYTES: Final = 5


@dataclass(slots=True)
class _Entry:
    submit: Submit
    new_ids: list[int] = field(default_factory=list)
    logprobs: bytearray = field(default_factory=bytearray)
    sent: int = 0
    end: Ended | None = None

    def unsent(self) -> TokenRun:
        """What the present connection was not told; counted as told."""
        size = len(self.logprobs) // len(self.new_ids)
        start, self.sent = self.sent, len(self.new_ids)
        position = len(self.submit.generated) + start
        return TokenRun(self.submit.attempt, position, tuple(self.new_ids[start:]), bytes(self.logprobs[start * size :]))


class Journal:
    """Attempts by epoch, and which of them have something that the present connection was not told yet."""

    def __init__(self) -> None:
        self._entries: dict[Epoch, _Entry] = {}
        self._fresh: dict[Epoch, _Entry] = {}
        self._frame = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def fresh(self) -> bool:
        """True when `frame` would have something to say."""
        return bool(self._fresh)

    def add(self, submit: Submit) -> bool:
        """Take an attempt in; False when it is known already."""
        if submit.attempt in self._entries:
            return False
        self._entries[submit.attempt] = _Entry(submit)
        return True

    def request_of(self, attempt: Epoch) -> str:
        """The id of the request that an attempt is for."""
        return self._entries[attempt].submit.request

    def take(self, output: StepOutput) -> None:
        """Tokens and ends of one engine step."""
        for run in output.runs:
            entry = self._entries[run.attempt]
            entry.new_ids += run.ids
            entry.logprobs += run.logprobs
            self._fresh[run.attempt] = entry
        for end in output.ends:
            entry = self._entries[end.attempt]
            entry.end = end
            self._fresh[end.attempt] = entry

    def lose(self, attempt: Epoch, fault: Fault) -> None:
        """End an attempt as lost, where it stands."""
        entry = self._entries[attempt]
        position = len(entry.submit.generated) + len(entry.new_ids)
        entry.end = Ended(attempt=attempt, position=position, reason=EndReason.LOST, fault=fault)
        self._fresh[attempt] = entry

    def lose_all(self, fault: Fault) -> None:
        """End as lost whatever has not ended."""
        for attempt in [attempt for attempt, entry in self._entries.items() if entry.end is None]:
            self.lose(attempt, fault)

    def acked(self, ends: tuple[Epoch, ...]) -> None:
        """Forget attempts whose end the other side keeps now."""
        for attempt in ends:
            entry = self._entries.get(attempt)
            if entry is not None and entry.end is not None:
                del self._entries[attempt]
                self._fresh.pop(attempt, None)

    def truth(self) -> Iterator[AttemptTruth]:
        """All there is, for a new connection; all of it counts as told, and frames count from 1 again."""
        self._frame = 0
        self._fresh.clear()
        for entry in self._entries.values():
            entry.sent = len(entry.new_ids)
            yield AttemptTruth(submit=entry.submit, new_ids=tuple(entry.new_ids), logprobs=bytes(entry.logprobs), end=entry.end)

    def frame(self) -> Tokens:
        """What this connection was not told yet, coalesced to one run per attempt, up to the size of a frame."""
        runs: list[TokenRun] = []
        ends: list[Ended] = []
        room = _MAX_FRAME_BYTES
        while self._fresh and room > 0:
            attempt = next(iter(self._fresh))
            entry = self._fresh.pop(attempt)
            if entry.sent < len(entry.new_ids):
                run = entry.unsent()
                runs.append(run)
                room -= _TOKEN_BYTES * len(run.ids) + len(run.logprobs)
            if entry.end is not None:
                ends.append(entry.end)
        self._frame += 1
        return Tokens(frame=self._frame, runs=tuple(runs), ends=tuple(ends))

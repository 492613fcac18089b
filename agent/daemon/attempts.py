"""The relay journal: every attempt that this node holds, its tokens, and its end until the manager has acknowledged it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from schema.errors import Fault, LinkError, Unreachable
from schema.ids import Epoch
from schema.link import AttemptTruth, Cancel, Ended, Submit, TokenRun
from schema.states import EndReason

__all__ = ["Attempt", "Journal", "Life"]

Life = tuple[str, Epoch]
"""An instance and the epoch of one of its lives."""

_MAX_FRAME_BYTES: Final = 8 << 20
"""New tokens of one frame, with their log-probabilities; a quarter of what a frame may have."""
_TOKEN_BYTES: Final = 5
"""What a token's id takes in a frame at most."""


class Attempt:
    """One attempt as it stands. ``new_ids`` follow the tokens it was submitted with; ``sent`` counts those of the sequence
    that the manager's present connection was given. ``carried`` is the worker's connection it was handed to, 0 if to none;
    ``repeats`` counts how often it was handed over again because that connection broke before the worker knew of it;
    ``cancel`` is the manager's, once it has come.
    """

    __slots__ = ("cancel", "carried", "end", "end_sent", "logprobs", "new_ids", "repeats", "sent", "submit")

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.new_ids: list[int] = []
        self.logprobs = bytearray()
        self.end: Ended | None = None
        self.sent = len(submit.generated)
        self.end_sent = False
        self.carried = 0
        self.repeats = 0
        self.cancel: Cancel | None = None

    @property
    def life(self) -> Life:
        return self.submit.instance, self.submit.instance_epoch

    @property
    def position(self) -> int:
        """How many tokens of the sequence are known here."""
        return len(self.submit.generated) + len(self.new_ids)

    def append(self, run: TokenRun) -> bool:
        """Take in a run from wherever it starts; True if it brought something new. Raises LinkError for a gap."""
        known = self.position
        if run.start > known:
            raise LinkError(f"attempt {run.attempt}: tokens from {run.start}, but only {known} are known: a gap")
        fresh = run.since(known)
        if not fresh.ids or self.end is not None:
            return False
        self.new_ids.extend(fresh.ids)
        self.logprobs += fresh.logprobs
        return True

    @property
    def token_bytes(self) -> int:
        """What one of its new tokens takes in a frame."""
        return _TOKEN_BYTES + self._record_bytes

    @property
    def _record_bytes(self) -> int:
        return len(self.logprobs) // len(self.new_ids) if self.new_ids else 0

    def unsent(self, limit: int) -> TokenRun | None:
        """What the manager has not been given yet, at most ``limit`` tokens; counted as sent."""
        start = self.sent - len(self.submit.generated)
        ids = tuple(self.new_ids[start : start + limit])
        if not ids:
            return None
        size = self._record_bytes
        run = TokenRun(self.submit.attempt, self.sent, ids, bytes(self.logprobs[start * size : (start + len(ids)) * size]))
        self.sent += len(ids)
        return run

    def continuation(self) -> Submit:
        """What lets a worker that does not know the attempt go on from where it stands."""
        generated, logprobs = (*self.submit.generated, *self.new_ids), self.submit.logprobs + self.logprobs
        return msgspec.structs.replace(self.submit, generated=generated, logprobs=logprobs)

    def truth(self) -> AttemptTruth:
        """The whole attempt, counted as sent."""
        self.sent = self.position
        self.end_sent = self.end is not None
        return AttemptTruth(submit=self.submit, new_ids=tuple(self.new_ids), logprobs=bytes(self.logprobs), end=self.end)


class Journal:
    """All attempts by their epoch. What it marks as fresh, the manager's link takes out frame by frame."""

    def __init__(self) -> None:
        self._attempts: dict[Epoch, Attempt] = {}
        self._live: dict[Life, set[Epoch]] = {}
        self._fresh: dict[Epoch, None] = {}

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._attempts.values())

    def get(self, attempt: Epoch) -> Attempt | None:
        return self._attempts.get(attempt)

    def live(self, life: Life) -> list[Attempt]:
        """Attempts of an instance's life that have not ended, oldest first."""
        return [self._attempts[epoch] for epoch in sorted(self._live.get(life, ()))]

    def busy(self, life: Life) -> bool:
        return bool(self._live.get(life))

    def add(self, submit: Submit) -> Attempt:
        """Take in an attempt that is not known yet."""
        attempt = self._attempts[submit.attempt] = Attempt(submit)
        self._live.setdefault(attempt.life, set()).add(submit.attempt)
        return attempt

    def append(self, run: TokenRun) -> None:
        """Tokens of a worker; of an attempt that is unknown they are dropped. Raises LinkError for a gap."""
        attempt = self._attempts.get(run.attempt)
        if attempt is not None and attempt.append(run):
            self._fresh[run.attempt] = None

    def end(self, ended: Ended) -> None:
        """The end of an attempt; the first one counts. Raises LinkError when it comes after tokens that are not known."""
        attempt = self._attempts.get(ended.attempt)
        if attempt is None or attempt.end is not None:
            return
        if ended.position != attempt.position:
            raise LinkError(
                f"attempt {ended.attempt} ended after {ended.position} tokens, but {attempt.position} are known: a gap"
            )
        attempt.end = ended
        live = self._live[attempt.life]
        live.discard(ended.attempt)
        if not live:
            del self._live[attempt.life]
        self._fresh[ended.attempt] = None

    def finish(self, attempt: Attempt, reason: EndReason, fault: Fault | None = None) -> None:
        """End an attempt from here, where it stands."""
        self.end(Ended(attempt=attempt.submit.attempt, position=attempt.position, reason=reason, fault=fault))

    def lose(self, life: Life, why: str) -> None:
        """End all that a life still had as lost."""
        for attempt in self.live(life):
            self.finish(attempt, EndReason.LOST, Fault.of(Unreachable(why)))

    def acked(self, ends: Iterable[Epoch]) -> dict[Life, list[Epoch]]:
        """Forget ended attempts; returns those that were known, by the life whose worker may forget them too."""
        forgotten: dict[Life, list[Epoch]] = {}
        for epoch in ends:
            attempt = self._attempts.get(epoch)
            if attempt is not None and attempt.end is not None:
                del self._attempts[epoch]
                self._fresh.pop(epoch, None)
                forgotten.setdefault(attempt.life, []).append(epoch)
        return forgotten

    def reset_sent(self) -> None:
        """A new connection of a manager begins: nothing is fresh beyond what its truth will say."""
        self._fresh.clear()

    @property
    def has_fresh(self) -> bool:
        return bool(self._fresh)

    def take_fresh(self) -> tuple[tuple[TokenRun, ...], tuple[Ended, ...]]:
        """All new tokens and ends, coalesced by attempt, up to the size of a frame; what is left stays fresh."""
        runs: list[TokenRun] = []
        ends: list[Ended] = []
        room = _MAX_FRAME_BYTES
        while self._fresh and room > 0:
            epoch = next(iter(self._fresh))
            attempt = self._attempts[epoch]
            run = attempt.unsent(max(1, room // attempt.token_bytes))
            if run is not None:
                runs.append(run)
                room -= len(run.ids) * attempt.token_bytes
            if attempt.sent < attempt.position:
                break
            if attempt.end is not None and not attempt.end_sent:
                ends.append(attempt.end)
                attempt.end_sent = True
            del self._fresh[epoch]
        return tuple(runs), tuple(ends)

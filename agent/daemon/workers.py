"""The worker's link: its truth taken in attempt by attempt, then its tokens relayed, and commands handed to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from agent.daemon.attempts import Attempt, Journal
from agent.daemon.connection import Connection
from agent.daemon.instances import Instances
from agent.daemon.life import Life
from schema.errors import Fault, LinkError, NotFound, SllmError
from schema.ids import Epoch
from schema.link import (
    Acked,
    AttemptTruth,
    Cancel,
    Hello,
    InstanceLoad,
    InstanceUpdate,
    Message,
    Ping,
    Submit,
    Tokens,
    TruthEnd,
    Welcome,
    WorkerMessage,
    WorkerTruth,
)
from schema.logs import about
from schema.states import EndReason, InstanceState

__all__ = ["Relay", "RelayOwner"]

_ACK_FRAMES: Final = 32
"""A worker's frames are acknowledged at least so often, well within its window."""
_BEATS: Final = 4
"""So many questions in a row, over ``hang_s``, must go by unanswered: a time in which this process stood still counts once."""
_MAX_REPEATS: Final = 3
"""How often an attempt that its worker does not know is handed over again."""
_log = logging.getLogger(__name__)


class RelayOwner(Protocol):
    """Who passes things on to the manager."""

    def attempts_changed(self) -> None: ...

    def load_changed(self, load: InstanceLoad) -> None: ...

    def worker_dialled(self, life: Life) -> None:
        """The worker's truth is complete."""

    @property
    def spoken(self) -> bool:
        """True once this agent's life has stated a truth to a manager: from then on nothing unknown is adopted."""


class Relay:
    """Attempts between the manager and the workers: the journal is theirs, this is the way to and fro.

    A worker that leaves a question unanswered for ``hang_s`` seconds is ended: its link would never tell.
    """

    def __init__(self, journal: Journal, instances: Instances, owner: RelayOwner, hang_s: float) -> None:
        self.journal = journal
        self.instances = instances
        self.owner = owner
        self.hang_s = hang_s
        self._serial = 0

    def welcome(self, connection: Connection, hello: Hello, welcome: Callable[[int], Welcome]) -> None:
        """A worker has dialled. Raises NotFound or Conflict for one that is not expected."""
        life = self.instances.expected(hello)
        if life.worker is not None:
            life.worker.close("it dialled again")
        self._serial += 1
        link = _WorkerLink(self, life, connection, self._serial)
        connection.begin(WorkerMessage, link, f"worker (pid {hello.pid}) of {hello.instance}")
        connection.send(welcome(0))

    def submit(self, message: Submit) -> None:
        """Take in an attempt and hand it to its worker; one that no ready instance can take ends as lost."""
        if self.journal.get(message.attempt) is not None:
            return
        attempt = self.journal.add(message)
        life = self.instances.get(message.instance, message.instance_epoch)
        if life is None or life.state is not InstanceState.READY or life.ending is not None:
            state = "not here" if life is None else f"{life.state}"
            fault = Fault.of(NotFound(f"instance {message.instance}, epoch {message.instance_epoch}, is {state}, not ready"))
            self.journal.finish(attempt, EndReason.LOST, fault)
            self.owner.attempts_changed()
        elif life.worker is not None:
            attempt.carried = life.worker.serial
            life.worker.send(message)
            _log.info(
                "handed to its worker", extra=about(request=message.request, attempt=message.attempt, instance=message.instance)
            )

    def cancel(self, message: Cancel) -> None:
        """Cancel an attempt; unknown and ended ones are ignored. While its worker's link is down, it waits for its truth."""
        attempt = self.journal.get(message.attempt)
        if attempt is None or attempt.end is not None:
            return
        attempt.cancel = message
        life = self.instances.get(*attempt.life)
        if not attempt.carried:
            self.journal.finish(attempt, message.reason)
            self.owner.attempts_changed()
        elif life is not None and life.worker is not None:
            life.worker.send(message)

    def acked(self, ends: tuple[Epoch, ...]) -> None:
        """The manager keeps these ends now; the workers need not any more."""
        for life_key, epochs in self.journal.acked(ends).items():
            life = self.instances.get(*life_key)
            if life is not None and isinstance(life.worker, _WorkerLink):
                life.worker.acknowledge(epochs)


class _WorkerLink:
    """One connection of one worker."""

    def __init__(self, relay: Relay, life: Life, connection: Connection, serial: int) -> None:
        self._relay = relay
        self._journal = relay.journal
        self._life = life
        self._connection = connection
        self._serial = serial
        self._truth: WorkerTruth | None = None
        self._complete = False
        self._stated: set[Epoch] = set()
        self._unknown: list[Epoch] = []
        self._forgotten: list[Epoch] = []
        self._frame = 0
        self._acked_frame = 0
        self._asked_at = 0.0
        self._unanswered = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def serial(self) -> int:
        return self._serial

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        self._connection.send(message, descriptors)

    def drain(self) -> None:
        self._connection.drain()

    def close(self, why: str) -> None:
        self._connection.close(why)

    def acknowledge(self, ends: list[Epoch]) -> None:
        self._acked_frame = self._frame
        self._connection.send(Acked(frame=self._frame, ends=tuple(ends)))

    # --- Handler

    def received(self, connection: Connection, message: Any) -> None:
        if not self._complete:
            self._take_truth(message)
            return
        match message:
            case Tokens():
                self._tokens(message)
            case InstanceLoad():
                if (message.instance, message.epoch) == self._life.key:
                    self._relay.owner.load_changed(message)
            case InstanceUpdate():
                if (message.truth.instance, message.truth.epoch) == self._life.key:
                    self._relay.instances.worker_changed(self._life, message.truth)
            case _:
                raise LinkError(f"a worker has no {type(message).__name__} to say after its truth")

    def drained(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection, why: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        _log.info("the link to the worker of %s is lost: %s", self._life.user, why)
        self._relay.instances.worker_lost(self._life, self)

    # --- its truth

    def _take_truth(self, message: Any) -> None:
        match message:
            case WorkerTruth() if self._truth is None:
                start = message.start
                if start is not None and (start.instance, start.epoch) != self._life.key:
                    raise LinkError(f"the worker of {self._life.user} states another life, {start.instance}/{start.epoch}")
                self._truth = message
            case AttemptTruth() if self._truth is not None:
                self._take_attempt(message)
            case TruthEnd() if self._truth is not None:
                if message.attempts != len(self._stated):
                    raise LinkError(f"the truth has {len(self._stated)} attempts, its end says {message.attempts}")
                self._complete_truth(self._truth)
            case _:
                raise LinkError(f"the worker said {type(message).__name__} before its truth was complete")

    def _take_attempt(self, message: AttemptTruth) -> None:
        submit = message.submit
        epoch = submit.attempt
        if (submit.instance, submit.instance_epoch) != self._life.key:
            raise LinkError(f"the worker of {self._life.user} states an attempt of another life")
        self._stated.add(epoch)
        attempt = self._journal.get(epoch)
        if attempt is None and self._relay.owner.spoken:
            (self._unknown if message.end is None else self._forgotten).append(epoch)
            return
        if attempt is None:
            attempt = self._journal.add(submit)
        attempt.carried = self._serial
        if attempt.end is not None and message.end is None:
            self._unknown.append(epoch)  # it ended here meanwhile
            return
        self._journal.append(message.run)
        if message.end is not None:
            self._journal.end(message.end)

    def _complete_truth(self, truth: WorkerTruth) -> None:
        self._complete = True
        for epoch in self._unknown:
            self.send(Cancel(attempt=epoch))
        if self._forgotten:
            self.acknowledge(self._forgotten)
        self._relay.instances.worker_stated(self._life, self, truth)
        for attempt in self._journal.live(self._life.key):
            self._reconcile(attempt)
        self._relay.owner.attempts_changed()
        self._relay.instances.check_idle(self._life)
        self._relay.owner.worker_dialled(self._life)
        self._beat()

    def _reconcile(self, attempt: Attempt) -> None:
        epoch = attempt.submit.attempt
        if epoch in self._stated:
            if attempt.cancel is not None:
                self.send(attempt.cancel)
        elif attempt.cancel is not None:
            self._journal.finish(attempt, attempt.cancel.reason)
        elif attempt.repeats < _MAX_REPEATS:
            # Not handed over yet, or lost with the connection. To end it as lost would say that this life is over.
            attempt.repeats += bool(attempt.carried)
            attempt.carried = self._serial
            self.send(attempt.continuation())
        else:
            why = f"its worker's link broke {attempt.repeats + 1} times when it was handed over: it may be what breaks it"
            self._journal.finish(attempt, EndReason.ERROR, Fault.of(SllmError(why)))

    # --- its silence

    def _beat(self) -> None:
        """Ask whether it still answers; it does so between two engine steps."""
        if self._connection.closed:
            return
        loop = asyncio.get_running_loop()
        if self._connection.heard_at >= self._asked_at:
            self._asked_at, self._unanswered = loop.time(), 0
            self.send(Ping(nonce=0))
        else:
            self._unanswered += 1
            if self._unanswered >= _BEATS:
                self._relay.instances.worker_hung(self._life, loop.time() - self._asked_at)
        self._timer = loop.call_later(self._relay.hang_s / _BEATS, self._beat)

    # --- its tokens

    def _tokens(self, message: Tokens) -> None:
        self._frame = message.frame
        for run in message.runs:
            self._journal.append(run)
        unknown = []
        for end in message.ends:
            if (attempt := self._journal.get(end.attempt)) is None:
                unknown.append(end.attempt)
            else:
                self._journal.end(end)
                fields = about(request=attempt.submit.request, attempt=end.attempt, reason=end.reason.value)
                _log.info("ended by its worker", extra=fields)
        self._relay.owner.attempts_changed()
        if unknown or self._frame - self._acked_frame >= _ACK_FRAMES:
            self.acknowledge(unknown)
        if message.ends:
            self._relay.instances.check_idle(self._life)

"""The worker: one instance's engine behind a link to the agent, in one thread.

Between two engine steps it takes in what has come over the link, so that a cancel takes effect within a step. What it was asked
and what it made of it stays in its journal until acknowledged; each new connection is told all of it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import Final

import msgspec

from agent.channel import Channel
from agent.config import NodeConfig
from agent.engine.api import EngineCapacity
from agent.engine.engine import BatchEngine
from agent.logs import OutputFile
from agent.workers.journal import Journal
from agent.workers.kin import kin_token
from agent.workers.startup import Startup
from schema.errors import Cancelled, Fault, LinkError, Unreachable
from schema.link import (
    Acked,
    Arriving,
    Attach,
    Cancel,
    Descriptors,
    Ended,
    EngineTiming,
    Fork,
    Hello,
    InstanceLoad,
    InstanceTruth,
    InstanceUpdate,
    LayersArrived,
    Ping,
    Pong,
    Role,
    Shutdown,
    StartWorker,
    StopInstance,
    Submit,
    ToWorker,
    TruthEnd,
    Welcome,
    WorkerTruth,
)
from schema.logs import about
from schema.states import InstanceState
from schema.version import VERSION

__all__ = ["Worker"]

_SOFTWARE: Final = f"sllmctl-worker {VERSION}"
_LOAD_EVERY_S: Final = 0.1
_IDLE_S: Final = 1.0
"""How often an idle worker looks whether it still has an agent; messages wake it at once."""
_WARM_AFTER_S: Final = 0.25
"""An instance that is started for a request has it by then."""
_BLOCKED_S: Final = 0.005
"""How soon it looks again whether a full socket has taken what was queued."""
_log = logging.getLogger(__name__)


class _EndedError(BaseException):
    """This life ends while a step waits for weights; what is computed in it is nobody's any more, so no engine may catch it."""


class Worker:
    """``fork`` says which instance this is, ``began_s`` (monotonic) when its process began, ``output`` is where it logs."""

    def __init__(self, config: NodeConfig, fork: Fork, began_s: float, output: OutputFile) -> None:
        self._output = output
        self._config = config
        self._fork = fork
        hello = Hello(
            role=Role.WORKER,
            software=_SOFTWARE,
            pid=os.getpid(),
            instance=fork.instance,
            epoch=fork.epoch,
            nonce=fork.nonce,
            token=kin_token(config),
        )
        self._channel: Channel[ToWorker] = Channel(config.socket_path, hello, ToWorker)
        self._journal = Journal()
        self._startup = Startup(config, began_s, self._await_layer)
        self._put_off: deque[Submit | Cancel | Acked] = deque()
        self._engine: BatchEngine | None = None
        self._truth: InstanceTruth | None = None
        self._handed_in = False
        self._stop_at: float | None = None
        self._failed = False
        self._load = (0, 0, 0)
        self._load_at = 0.0
        self._warm_at = 0.0

    def run(self) -> int:
        """Serve to the end. Returns the exit code: 0 when told to stop or left alone, 1 after a failed start or a refusal."""
        while True:
            while self._put_off:
                self._handle(self._put_off.popleft())
            for message in self._channel.poll(0.0 if self._busy else self._wait_s()):
                self._handle(message)
            if self._channel.refused:
                _log.error("the agent refuses this worker: %s", self._channel.last_refusal)
                return 1
            if self._busy:
                self._step()
            elif self._warm_due_s == 0.0:
                self._warm()
            self._tell()
            code = self._ended()
            if code is not None:
                self._close()
                return code

    @property
    def _busy(self) -> bool:
        return self._engine is not None and (self._handed_in or self._engine.running > 0 or self._engine.waiting > 0)

    def _wait_s(self) -> float:
        wait_s = _IDLE_S
        now = time.monotonic()
        if (due_s := self._warm_due_s) is not None:
            wait_s = min(wait_s, due_s)
        if self._stop_at is not None:
            wait_s = min(wait_s, max(0.0, self._stop_at - now))
        if not self._channel.connected:
            wait_s = min(wait_s, max(0.0, self._config.agent_grace_s - self._channel.lost_for_s))
        elif self._journal.fresh:
            wait_s = min(wait_s, _BLOCKED_S)
        elif self._load != self._current_load():
            wait_s = min(wait_s, max(0.0, self._load_at + _LOAD_EVERY_S - now))
        return wait_s

    @property
    def _warm_due_s(self) -> float | None:
        """Seconds until a first step that nobody sees is due; None when there was one, or while weights are coming."""
        if self._engine is None or self._engine.proven or self._failed or self._stop_at is not None:
            return None
        if self._startup.attached is None:
            return None
        return max(0.0, self._warm_at - time.monotonic())

    def _warm(self) -> None:
        """No request has come yet: let the first one find pages mapped and kernels made."""
        assert self._engine is not None
        try:
            self._engine.warm()
        except Exception as error:
            self._fail(error)

    def _step(self) -> None:
        assert self._engine is not None
        self._handed_in = False
        try:
            output = self._engine.step()
        except _EndedError:
            self._engine = None
            return
        self._journal.take(output)
        for end in output.ends:
            self._log_end(end)

    def _await_layer(self, layer: int) -> None:
        """Within a step: serve the link until this layer has come. What is about requests waits for the end of the step.

        Raises _EndedError when the weights will not come, or nobody wants them any more.
        """
        while not self._startup.has(layer):
            for message in self._channel.poll(self._wait_s()):
                if isinstance(message, Submit | Cancel | Acked):
                    self._put_off.append(message)
                else:
                    self._handle(message)
            self._tell()
            if self._failed or self._channel.refused or self._ended() is not None:
                raise _EndedError

    def _tell(self) -> None:
        """Tokens when the socket has taken all before them, and the load when it changed."""
        if not self._channel.connected or self._channel.backlog:
            return
        if self._journal.fresh:
            self._channel.send(self._journal.frame())
        load = self._current_load()
        now = time.monotonic()
        if load != self._load and now >= self._load_at + _LOAD_EVERY_S:
            self._load, self._load_at = load, now
            self._output.turn()
            running, waiting, used = load
            self._channel.send(
                InstanceLoad(
                    instance=self._fork.instance,
                    epoch=self._fork.epoch,
                    running=running,
                    waiting=waiting,
                    kv_used_tokens=used,
                    counts=None if self._engine is None else self._engine.counts,
                )
            )

    def _current_load(self) -> tuple[int, int, int]:
        engine = self._engine
        return (0, 0, 0) if engine is None else (engine.running, engine.waiting, engine.kv_used_tokens)

    def _ended(self) -> int | None:
        """The exit code once there is nothing more to do here."""
        if self._failed:
            gone = self._channel.lost_for_s >= self._config.agent_grace_s
            return 1 if self._channel.connected or gone else None
        if self._stop_at is not None and (not self._busy or time.monotonic() >= self._stop_at):
            self._journal.lose_all(Fault.of(Cancelled("the instance was stopped")))
            return 0
        lost_s, grace_s = self._channel.lost_for_s, self._config.agent_grace_s
        if not self._channel.connected and lost_s >= grace_s and (not self._busy or lost_s >= 2 * grace_s):
            _log.warning("no agent for %.0f s", lost_s)
            return 0
        return None

    def _close(self) -> None:
        while self._channel.connected and self._journal.fresh:
            self._channel.send(self._journal.frame())
        self._channel.close()

    # --- What the agent says

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if self._engine is not None:
                    self._engine.cancel(message.attempt, message.reason)
                    self._handed_in = True
            case Acked():
                self._journal.acked(message.ends)
            case Ping():
                self._channel.send(Pong(nonce=message.nonce))
            case Welcome():
                self._state_truth()
            case Descriptors():
                self._take_descriptors(message)
            case StartWorker():
                self._begin(message)
            case Arriving() | Attach():
                self._attach(message)
            case LayersArrived():
                self._startup.arrived(message)
            case StopInstance():
                if (message.instance, message.epoch) == (self._fork.instance, self._fork.epoch):
                    self._stop(message.grace_s)
            case Shutdown():
                self._stop(message.grace_s)
            case _:
                _log.warning("the agent said %s, which says nothing to a worker", type(message).__name__)

    def _state_truth(self) -> None:
        asked, attached = self._startup.asked, self._startup.attached
        self._channel.send(
            WorkerTruth(
                truth=self._truth,
                start=None if asked is None else asked.start,
                arena="" if attached is None else attached.arena,
                extents=() if attached is None else attached.extents,
                weights=None if attached is None else attached.weights,
            )
        )
        count = 0
        for attempt in self._journal.truth():
            self._channel.send(attempt)
            count += 1
        self._channel.send(TruthEnd(attempts=count))
        self._load = (-1, 0, 0)

    def _submit(self, submit: Submit) -> None:
        if (submit.instance, submit.instance_epoch) != (self._fork.instance, self._fork.epoch):
            _log.warning("attempt %d is for another life, %s/%d", submit.attempt, submit.instance, submit.instance_epoch)
            return
        if not self._journal.add(submit):
            return
        if self._engine is None or self._stop_at is not None:
            state = "starting" if self._engine is None else "stopping"
            self._journal.lose(submit.attempt, Fault.of(Unreachable(f"instance {self._fork.instance} is {state}")))
            return
        self._engine.submit(submit)
        self._handed_in = True
        fields = about(
            request=submit.request,
            attempt=submit.attempt,
            choice=submit.choice or None,
            prompt_tokens=len(submit.prompt),
            resumed_at=len(submit.generated) or None,
        )
        _log.info("begun", extra=fields)

    def _log_end(self, end: Ended) -> None:
        timing = end.timing or EngineTiming()
        fields = about(
            request=self._journal.request_of(end.attempt),
            attempt=end.attempt,
            reason=end.reason.value,
            why=end.fault.message if end.fault is not None else None,
            position=end.position,
            queued_s=timing.queued_s,
            weights_s=timing.weights_s or None,
            prefill_s=timing.prefill_s,
            first_token_s=timing.first_token_s,
            total_s=timing.total_s,
            steps=timing.steps,
            cached_tokens=timing.cached_tokens,
        )
        _log.info("ended", extra=fields)

    def _stop(self, grace_s: float) -> None:
        at = time.monotonic() + grace_s
        self._stop_at = at if self._stop_at is None else min(at, self._stop_at)
        if self._truth is not None and not self._failed:
            self._truth = msgspec.structs.replace(self._truth, state=InstanceState.STOPPING)

    # --- Becoming ready

    def _take_descriptors(self, message: Descriptors) -> None:
        try:
            self._startup.keep(self._channel.take_descriptors(message.count))
        except LinkError as error:
            self._fail(error)

    def _begin(self, message: StartWorker) -> None:
        start = message.start
        if self._truth is not None or (start.instance, start.epoch) != (self._fork.instance, self._fork.epoch):
            return
        self._truth = InstanceTruth(
            instance=start.instance,
            epoch=start.epoch,
            digest=start.digest,
            state=InstanceState.STARTING,
            devices=start.devices,
            pid=os.getpid(),
        )
        try:
            self._startup.begin(message)
        except Exception as error:
            self._fail(error)

    def _attach(self, message: Arriving | Attach) -> None:
        """Ready, once there is an engine over weights or over where they come to be; told again when all of them are there."""
        if self._failed:
            return
        try:
            engine = self._startup.take(message)
        except Exception as error:
            self._fail(error)
            return
        if engine is not None:
            self._engine = engine
        if self._engine is not None and (engine is not None or isinstance(message, Attach)):
            self._warm_at = time.monotonic() + _WARM_AFTER_S
            self._become_ready(self._engine.capacity)

    def _become_ready(self, capacity: EngineCapacity) -> None:
        assert self._truth is not None
        self._truth = msgspec.structs.replace(
            self._truth,
            state=InstanceState.READY if self._stop_at is None else InstanceState.STOPPING,
            kv_capacity_tokens=capacity.kv_tokens,
            max_context_tokens=capacity.max_context_tokens,
            activation_bytes=capacity.activation_bytes,
            logits_bytes=capacity.logits_bytes,
            phases=None if self._startup.attached is None else self._startup.phases,
        )
        self._channel.send(InstanceUpdate(truth=self._truth))

    def _fail(self, error: Exception) -> None:
        """State the end of this life with its reason; the process follows once that was said."""
        _log.error("instance %s cannot start: %s", self._fork.instance, error, exc_info=error)
        self._failed = True
        if self._truth is None:
            return
        self._truth = msgspec.structs.replace(self._truth, state=InstanceState.STOPPED, fault=Fault.of(error))
        self._channel.send(InstanceUpdate(truth=self._truth))

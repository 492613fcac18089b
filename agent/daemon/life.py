"""One life of an instance as the agent knows it: what was asked, the worker that serves it, how far it has come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from agent.daemon.process import Process
from agent.daemon.roster import RosterEntry
from schema.errors import Fault
from schema.ids import Epoch
from schema.link import Arriving, DeviceWeights, Extent, InstanceTruth, Message, Resident, StartInstance, StartPhases
from schema.states import InstanceState

__all__ = ["Life", "WorkerDoor"]


class WorkerDoor(Protocol):
    """A worker's present connection, once its truth is complete."""

    @property
    def serial(self) -> int: ...

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None: ...

    def drain(self) -> None:
        """Take in what it has already said."""

    def close(self, why: str) -> None: ...


@dataclass(eq=False, slots=True)
class Life:
    """``directory`` is the checkpoint's, relative to the node's checkpoints, and ``partial`` where it lies while it is fetched,
    relative to the node's data; ``image_id`` is of the manifest there. ``worker`` is None while no worker's truth is known.

    ``after`` is the older life that must be dead before this one begins, ``before`` the newer one that waits for this one.
    ``quiet``: what ends it is not told as stopping, because nobody asked for it. ``asked`` and ``attached`` are what the
    worker has been given: `StartWorker` and `Attach`. On a node with devices it is ``weights`` that it attaches, else the
    ``resident`` image; ``arriving`` is that image while it comes, ``offered`` the arena and extents that the worker was told of
    it. ``fill`` and ``fetch`` are ops that it waits for; ``lay_there``: the image that lay in the arena when it asked for the
    fetch, which that did not bring. ``remote`` is what ``fault`` is said of, where that came of a fetch.
    """

    start: StartInstance
    directory: str = ""
    image_id: str = ""
    partial: str = ""
    state: InstanceState = InstanceState.STARTING
    fault: Fault | None = None
    remote: str = ""
    stop_grace_s: float | None = None
    process: Process | None = None
    nonce: int = 0
    worker: WorkerDoor | None = None
    asked: bool = False
    attached: bool = False
    fill: str = ""
    fetch: str = ""
    lay_there: str | None = None
    resident: Resident | None = None
    arriving: Arriving | None = None
    offered: tuple[str, tuple[Extent, ...]] | None = None
    weights: DeviceWeights | None = None
    kv_capacity_tokens: int = 0
    max_context_tokens: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    phases: StartPhases = field(default_factory=StartPhases)
    begun: float = field(default_factory=time.monotonic)
    timer: asyncio.TimerHandle | None = None
    ending: asyncio.Task[None] | None = None
    after: Life | None = None
    before: Life | None = None

    @property
    def key(self) -> tuple[str, Epoch]:
        return self.start.instance, self.start.epoch

    @property
    def user(self) -> str:
        """Its name among the users of its checkpoint."""
        return f"{self.start.instance}/{self.start.epoch}"

    @property
    def stopped(self) -> bool:
        return self.state is InstanceState.STOPPED

    @property
    def whole(self) -> bool:
        """It serves and has all of its weights; before that it may be ready for requests."""
        return self.phases.total_s > 0

    def truth(self) -> InstanceTruth:
        early = self.state is InstanceState.READY and not self.whole
        return InstanceTruth(
            instance=self.start.instance,
            epoch=self.start.epoch,
            digest=self.start.digest,
            state=self.state,
            devices=self.start.devices,
            kv_capacity_tokens=self.kv_capacity_tokens,
            max_context_tokens=self.max_context_tokens,
            activation_bytes=self.activation_bytes,
            logits_bytes=self.logits_bytes,
            phases=None if early or self.phases == StartPhases() else self.phases,
            fault=self.fault,
            remote=self.remote,
            pid=self.process.pid if self.process is not None and not self.stopped else 0,
        )

    def entry(self) -> RosterEntry:
        """What the agent's next life must know of it."""
        return RosterEntry(
            role="worker",
            pid=self.process.pid if self.process is not None else 0,
            ticks=self.process.ticks if self.process is not None else 0,
            instance=self.start.instance,
            epoch=self.start.epoch,
            nonce=self.nonce,
            start=self.start,
            phases=self.phases if self.whole else None,
            stop_grace_s=self.stop_grace_s,
            fetching=bool(self.fetch),
            directory=self.directory,
            image_id=self.image_id,
        )

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

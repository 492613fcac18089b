"""A simulated node: agent, store and workers in one, keeping the link's rules in virtual time.

It hears what a manager says and answers as an agent does, at once: words and processes cost no time, only loads, building and
computing do. Weights stay on their devices when an instance stops, until `DropCheckpoint`; an instance stops as soon as it is
told to, or with its last sequence. For its memory and its loads see `store`.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Protocol

from schema.errors import Fault, NotFound, OutOfSpace, SllmError
from schema.ids import Epoch
from schema.link import (
    ArenaInfo,
    Cancel,
    DeviceInfo,
    DropCheckpoint,
    Ended,
    EngineTiming,
    InstanceTruth,
    InstanceUpdate,
    Inventory,
    LoadCheckpoint,
    ManagerMessage,
    NodeTruth,
    OperationDone,
    PlacementUpdate,
    StartInstance,
    StartPhases,
    StopInstance,
    Submit,
    TokenRun,
    Tokens,
)
from schema.states import EndReason, InstanceState, Tier
from sllmctl.simulate.engine import Engine, Job
from sllmctl.simulate.kernel import Kernel, Timer
from sllmctl.simulate.scenario import NodeGroup
from sllmctl.simulate.store import SimModel, Store

__all__ = ["Life", "NodeOwner", "SimNode", "zeros"]

_LOST = Fault("unreachable", "its instance was stopped")


@lru_cache(maxsize=4096)
def zeros(count: int) -> tuple[int, ...]:
    """So many token ids; which ones they are matters to nobody here."""
    return (0,) * count


class NodeOwner(Protocol):
    """The cluster around a node."""

    def said(self, node: str, message: InstanceUpdate | PlacementUpdate | OperationDone) -> None: ...

    def delivered(self, node: str, tokens: Tokens) -> None: ...

    def started(self, life: Life, tier: Tier, peer: bool) -> None:
        """A life has begun to load its weights, from this tier, or a peer."""

    def taken(self, life: Life, submit: Submit) -> int:
        """An instance got an attempt; returns how many tokens its reply will have."""

    def first_token(self, request: str) -> None: ...

    def lost(self, life: Life, requests: list[str], *, preempted: bool) -> None:
        """Attempts ended because their instance did. Said before the router hears of it."""

    def dropped(self, digest: str) -> None:
        """Idle weights left a device to make room."""

    def source(self, instance: str) -> tuple[Tier, str] | None:
        """Where an instance's weights are to come from, if that was decided: a tier, or a node (then with REMOTE)."""

    def peer(self, node: str) -> SimNode: ...


class Life:
    """One life of an instance. ``engine`` is there while it is ready, ``stopped`` says that it is over."""

    def __init__(self, node: SimNode, start: StartInstance, model: SimModel) -> None:
        self.node = node
        self.instance = start.instance
        self.epoch = start.epoch
        self.model = model
        self.devices = [node.store.devices[index] for index in start.devices]
        self.start = start
        self.state = InstanceState.STARTING
        self.engine: Engine | None = None
        self.phases: StartPhases | None = None
        self.begun_at = node.kernel.now
        self.ready_at = float("inf")
        self.stopped = self.draining = False
        self.timer: Timer | None = None

    def truth(self, fault: Fault | None = None) -> InstanceTruth:
        ready = self.engine is not None
        capacity = self.engine.capacity_tokens if self.engine is not None else 0
        context = self.start.options.max_context_tokens or self.model.group.max_context_tokens
        return InstanceTruth(
            instance=self.instance,
            epoch=self.epoch,
            digest=self.model.digest,
            state=self.state,
            devices=self.start.devices,
            kv_capacity_tokens=capacity,
            max_context_tokens=min(context, capacity) if ready else 0,
            phases=self.phases,
            fault=fault,
        )

    # --- as the engine's listener ---

    def first_token(self, job: Job) -> None:
        self.node.owner.first_token(job.key)

    def ended(self, engine: Engine, ends: list[tuple[Job, EndReason]]) -> None:
        self.node.deliver([job for job, _ in ends], [reason for _, reason in ends])
        if self.draining and engine.empty:
            self.node.end(self)


class SimNode:
    def __init__(self, kernel: Kernel, name: str, group: NodeGroup, models: dict[str, SimModel], owner: NodeOwner) -> None:
        self.kernel = kernel
        self.name = name
        self.owner = owner
        self.group = group
        self.store = Store(kernel, group, models, self._changed, lambda node: owner.peer(node).store)
        self.lives: dict[str, Life] = {}
        self._models = models
        """By digest."""
        self._frame = 0

    # --- the truth ---

    def truth(self) -> NodeTruth:
        group = self.group
        kind = "cpu" if self.store.cpu else "cuda"
        inventory = Inventory(
            hostname=self.name,
            cpus=1,
            memory_bytes=group.dram_bytes,
            devices=tuple(
                DeviceInfo(index=device.index, kind=kind, name=group.device_kind, memory_bytes=device.memory_bytes)
                for device in self.store.devices
            ),
            arena=ArenaInfo(id=self.name, budget_bytes=group.dram_bytes, chunk_bytes=1),
            disk_read_bps=group.disk_bps,
            device_copy_bps=group.device_bps,
            numerics=group.device_kind,
        )
        checkpoints = tuple(self.store.placed(digest) for digest in self.store.digests())
        return NodeTruth(node=self.name, inventory=inventory, checkpoints=checkpoints)

    def _changed(self, digest: str) -> None:
        self.owner.said(self.name, PlacementUpdate(truth=self.store.placed(digest)))

    # --- what it hears ---

    def hear(self, message: ManagerMessage) -> None:
        """From the router a `Submit` or a `Cancel`, which are not answered before this returns; else from the control loop."""
        match message:
            case Submit():
                self._submit(message)
            case StartInstance():
                self._start(message)
            case StopInstance():
                self._stop(message)
            case DropCheckpoint():
                self._drop(message)
            case LoadCheckpoint():
                self._prefetch(message)
            case Cancel(attempt=attempt):
                self.kernel.soon(partial(self._cancel, attempt))
            case _:
                return

    def _submit(self, submit: Submit) -> None:
        life = self.lives.get(submit.instance)
        if life is None or life.epoch != submit.instance_epoch or life.engine is None:
            self.kernel.soon(partial(self._refuse, submit))
            return
        output = min(self.owner.taken(life, submit), submit.params.max_tokens)
        job = Job(submit.attempt, submit.request, len(submit.prompt), len(submit.generated), output, self.kernel.now)
        life.engine.submit(job)

    def _refuse(self, submit: Submit) -> None:
        end = Ended(attempt=submit.attempt, position=len(submit.generated), reason=EndReason.LOST, fault=_LOST)
        self._say((), (end,))

    def _cancel(self, attempt: Epoch) -> None:
        for life in list(self.lives.values()):
            if life.engine is not None:
                life.engine.cancel(attempt)

    # --- lives ---

    def _start(self, start: StartInstance) -> None:
        known = self.lives.get(start.instance)
        if known is not None:
            if known.epoch >= start.epoch:
                return
            self.end(known)
        model = self._models[start.digest]
        life = Life(self, start, model)
        self.lives[start.instance] = life
        for device in life.devices:
            device.hold(start.options.kv_bytes)
        load = self.store.load(model, life.devices, self.owner.source(life.instance))
        if load is None:
            self.end(life, Fault.of(OutOfSpace(f"the arena of node {self.name} is full of checkpoints in use")))
            return
        now, finish_s = self.kernel.now, model.group.finish_s
        ready_at = max(load.end, now + model.group.build_s) + finish_s
        life.phases = StartPhases(
            load_s=load.end - now,
            loaded_from=load.tier,
            loaded_bytes=0 if load.tier is Tier.DEVICE else model.group.weights_bytes,
            build_s=model.group.build_s,
            warm_s=finish_s,
            total_s=ready_at - now,
        )
        life.timer = self.kernel.at(ready_at, partial(self._ready, life))
        self.owner.started(life, load.tier, load.peer)

    def _ready(self, life: Life) -> None:
        group = life.model.group
        capacity = life.start.options.kv_bytes * len(life.devices) // group.kv_token_bytes
        computes = tuple(device.compute for device in life.devices)
        life.engine = Engine(self.kernel, computes, group.speed, capacity, life.start.options.max_concurrency, life)
        life.state = InstanceState.READY
        life.ready_at = self.kernel.now
        life.timer = None
        self.owner.said(self.name, InstanceUpdate(truth=life.truth()))

    def _stop(self, message: StopInstance) -> None:
        life = self.lives.get(message.instance)
        if life is None or life.epoch < message.epoch:
            if life is not None:
                self.end(life)
            truth = InstanceTruth(instance=message.instance, epoch=message.epoch, digest="", state=InstanceState.STOPPED)
            self.owner.said(self.name, InstanceUpdate(truth=truth))
        elif life.epoch == message.epoch:
            if life.timer is not None:
                life.timer.cancel()
                life.timer = None
            if message.grace_s > 0 and life.engine is not None and not life.engine.empty:
                life.draining = True
                life.timer = self.kernel.call_later(message.grace_s, partial(self.end, life))
            else:
                self.end(life, preempted=message.grace_s == 0 and life.engine is not None)

    def end(self, life: Life, fault: Fault | None = None, *, preempted: bool = False) -> None:
        """A life is over: its sequences are lost, its KV cache is free, its weights stay."""
        if life.stopped:
            return
        life.stopped = True
        life.state = InstanceState.STOPPED
        if life.timer is not None:
            life.timer.cancel()
        del self.lives[life.instance]
        self.release(life, preempted=preempted)
        life.engine = None
        for device in life.devices:
            device.release(life.start.options.kv_bytes)
        if fault is None:
            self.store.let_go(life.model.digest, life.devices)
        self.owner.said(self.name, InstanceUpdate(truth=life.truth(fault)))

    def release(self, life: Life, *, preempted: bool = False) -> None:
        """Let all sequences of a life go: what they have made is delivered, then they end, as lost if something is left."""
        jobs = life.engine.close() if life.engine is not None else []
        if not jobs:
            return
        lost = [job.key for job in jobs if job.made < job.output]
        if lost:
            self.owner.lost(life, lost, preempted=preempted)
        self.deliver(jobs, [EndReason.LOST if job.made < job.output else EndReason.STOP for job in jobs])

    def deliver(self, jobs: list[Job], reasons: list[EndReason | None]) -> None:
        """Say what these jobs have made since they last said something, and how they ended, if they did."""
        now = self.kernel.now
        runs: list[TokenRun] = []
        ends: list[Ended] = []
        for job, reason in zip(jobs, reasons, strict=True):
            if job.made > job.said:
                runs.append(TokenRun(job.attempt, job.said, zeros(job.made - job.said)))
                job.said = job.made
            if reason is not None:
                fault = _LOST if reason is EndReason.LOST else None
                ends.append(Ended(attempt=job.attempt, position=job.made, reason=reason, fault=fault, timing=_timing(job, now)))
        if runs or ends:
            self._say(tuple(runs), tuple(ends))

    def _say(self, runs: tuple[TokenRun, ...], ends: tuple[Ended, ...]) -> None:
        self._frame += 1
        self.owner.delivered(self.name, Tokens(frame=self._frame, runs=runs, ends=ends))

    # --- operations ---

    def _prefetch(self, message: LoadCheckpoint) -> None:
        digest = message.digest
        model = self._models.get(digest)
        if model is None or message.tier is not Tier.DRAM:
            fault = Fault.of(NotFound(f"checkpoint {digest} cannot be brought to {message.tier.value} here"))
            self.owner.said(self.name, OperationDone(op=message.op, digest=digest, fault=fault))
            return
        load = self.store.read(model, None, [])
        if load is None:
            fault = Fault.of(OutOfSpace(f"the arena of node {self.name} is full of checkpoints in use"))
            self.owner.said(self.name, OperationDone(op=message.op, digest=digest, fault=fault))
            return
        self.kernel.at(load.end, partial(self.owner.said, self.name, OperationDone(op=message.op, digest=digest)))

    def _drop(self, message: DropCheckpoint) -> None:
        fault: Fault | None = None
        digest = message.digest
        try:
            self.store.drop(digest, message.tier)
        except SllmError as error:
            fault = Fault.of(error)
        if fault is None and message.tier is Tier.DEVICE:
            self.owner.dropped(digest)
        self.owner.said(self.name, OperationDone(op=message.op, digest=digest, fault=fault))


def _timing(job: Job, now: float) -> EngineTiming | None:
    """None for an attempt of which a part was prefilled ahead: its times say nothing of the model's speed."""
    if job.held:
        return None
    prefill_at = job.prefill_at if job.prefill_at >= 0 else now
    first_at = job.first_at if job.first_at >= 0 else prefill_at
    return EngineTiming(
        queued_s=prefill_at - job.submitted_at,
        prefill_s=first_at - prefill_at,
        first_token_s=first_at - job.submitted_at if job.first_at >= 0 else 0.0,
        total_s=now - job.submitted_at,
        steps=job.made - job.started,
    )

"""A simulated node, or two, with somebody who notes what is said."""

from __future__ import annotations

from dataclasses import dataclass, field

from schema.ids import Epoch
from schema.link import (
    DropCheckpoint,
    Ended,
    EngineOptions,
    InstanceTruth,
    InstanceUpdate,
    OperationDone,
    PlacementUpdate,
    SamplingParams,
    StartInstance,
    StopInstance,
    Submit,
    Tokens,
)
from schema.states import InstanceState, Tier
from sllmctl.simulate.kernel import Kernel
from sllmctl.simulate.node import Life, SimNode
from sllmctl.simulate.scenario import ModelGroup, NodeGroup, Speed
from sllmctl.simulate.store import SimModel

__all__ = ["GB", "Bench", "group", "machine"]

GB = 10**9


def machine(**more: object) -> NodeGroup:
    """Two devices of 40 GB behind links of 20 GB/s, a disk of 5 GB/s, a network of 1 GB/s, an arena of 50 GB."""
    facts: dict[str, object] = {
        "name": "n",
        "devices": 2,
        "device_bytes": 40 * GB,
        "device_bps": 20 * GB,
        "dram_bytes": 50 * GB,
        "disk_bps": 5 * GB,
        "network_bps": GB,
    }
    return NodeGroup(**{**facts, **more})  # type: ignore[arg-type]


def group(**more: object) -> ModelGroup:
    """20 GB of weights, 1 MB a token; a prefill costs a millisecond a token, a step a tenth of a second."""
    facts: dict[str, object] = {
        "name": "g",
        "weights_bytes": 20 * GB,
        "kv_token_bytes": 1_000_000,
        "speed": Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1),
        "finish_s": 0.5,
    }
    return ModelGroup(**{**facts, **more})  # type: ignore[arg-type]


@dataclass
class Bench:
    """Nodes "a" and "b"; models "m0" to "m3". Implements `NodeOwner`; ``heard`` and ``ends`` are in order, with their times."""

    machine: NodeGroup = field(default_factory=machine)
    group: ModelGroup = field(default_factory=group)
    heard: list[tuple[float, str, InstanceUpdate | PlacementUpdate | OperationDone]] = field(default_factory=list)
    ends: list[tuple[float, Ended]] = field(default_factory=list)
    tokens: dict[Epoch, int] = field(default_factory=dict)
    firsts: dict[str, float] = field(default_factory=dict)
    starts: list[tuple[str, Tier, bool]] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, tuple[Tier, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kernel = Kernel()
        self.models = {f"m{number}": SimModel(number, f"m{number}", f"m{number}", self.group) for number in range(4)}
        self.nodes = {name: SimNode(self.kernel, name, self.machine, self.models, self) for name in "ab"}
        self.epochs = 0

    # --- as a manager ---

    def start(self, instance: str, digest: str, devices: tuple[int, ...] = (0,), *, node: str = "a", kv: int = 10 * GB) -> None:
        self.epochs += 1
        options = EngineOptions(kv_bytes=kv, max_context_tokens=2048, max_concurrency=8)
        self.nodes[node].hear(
            StartInstance(
                instance=instance, epoch=Epoch(self.epochs), model=digest, digest=digest, devices=devices, options=options
            )
        )

    def stop(self, instance: str, grace_s: float = 0.0, *, node: str = "a") -> None:
        epoch = self.nodes[node].lives[instance].epoch
        self.nodes[node].hear(StopInstance(instance=instance, epoch=epoch, grace_s=grace_s))

    def submit(self, instance: str, request: str, prompt: int, output: int, *, generated: int = 0, node: str = "a") -> Epoch:
        self.epochs += 1
        self.outputs[request] = output
        life = self.nodes[node].lives.get(instance)
        self.nodes[node].hear(
            Submit(
                attempt=Epoch(self.epochs),
                instance=instance,
                instance_epoch=life.epoch if life is not None else Epoch(1),
                request=request,
                model="m",
                prompt=(0,) * prompt,
                generated=(0,) * generated,
                params=SamplingParams(max_tokens=2000),
            )
        )
        return Epoch(self.epochs)

    def drop(self, digest: str, tier: Tier, *, node: str = "a") -> OperationDone:
        self.nodes[node].hear(DropCheckpoint(op="op", digest=digest, tier=tier))
        said = self.heard[-1][2]
        assert isinstance(said, OperationDone)
        return said

    def run(self, until_s: float = float("inf")) -> None:
        """Let time pass until then."""
        if until_s < float("inf"):
            self.kernel.at(until_s, lambda: None)
        self.kernel.run(lambda: self.kernel.now >= until_s)

    def states(self, instance: str) -> list[tuple[float, InstanceState]]:
        return [(at, truth.state) for at, truth in self._truths() if truth.instance == instance]

    def last(self, instance: str) -> InstanceTruth:
        return [truth for _, truth in self._truths() if truth.instance == instance][-1]

    def _truths(self) -> list[tuple[float, InstanceTruth]]:
        return [(at, said.truth) for at, _, said in self.heard if isinstance(said, InstanceUpdate)]

    def lies(self, digest: str, *, node: str = "a") -> dict[tuple[Tier, int], tuple[int, int]]:
        """By tier and device: (bytes, users), as last stated."""
        said = [one.truth for _, name, one in self.heard if isinstance(one, PlacementUpdate) and name == node]
        placements = [truth for truth in said if truth.digest == digest][-1].placements
        return {(one.tier, one.device): (one.size_bytes, one.users) for one in placements}

    # --- as the owner of nodes ---

    def said(self, node: str, message: InstanceUpdate | PlacementUpdate | OperationDone) -> None:
        self.heard.append((self.kernel.now, node, message))

    def delivered(self, node: str, tokens: Tokens) -> None:
        for run in tokens.runs:
            self.tokens[run.attempt] = run.start + len(run.ids)
        self.ends += [(self.kernel.now, end) for end in tokens.ends]

    def started(self, life: Life, tier: Tier, peer: bool) -> None:
        self.starts.append((life.instance, tier, peer))

    def taken(self, life: Life, submit: Submit) -> int:
        return self.outputs[submit.request]

    def first_token(self, request: str) -> None:
        self.firsts[request] = self.kernel.now

    def lost(self, life: Life, requests: list[str], *, preempted: bool) -> None:
        self.losses += requests

    def dropped(self, digest: str) -> None:
        pass

    def source(self, instance: str) -> tuple[Tier, str] | None:
        return self.wanted.get(instance)

    def peer(self, node: str) -> SimNode:
        return self.nodes[node]

"""What a decision costs: placements on 1,000 nodes x 8 devices with 10,000 models, nearly full, on one core.

Every device of 80 GB is filled with instances and idle weights of models of 8 to 60 GB (the largest on two devices) until
hardly any has room for one more; a checkpoint lies on 20 disks and in the DRAM of 2 nodes, a third of the instances rest, and
some nodes load something. Models are asked for at random, the view is changed between the questions as it is by a running
cluster, and the processor time of each answer is measured. The first figures are without the ability to migrate, the second
with it. The third are of a cluster that is full of busy instances of which nobody knows when they end: all is refused.

    python -m bench.planner [--nodes 1000] [--models 10000] [--plans 2000] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.report import Report
from schema.ids import Epoch
from schema.link import ArenaInfo, DeviceInfo, Inventory
from schema.spec import EngineSpec, ModelSpec, PathSource, ScaleSpec
from schema.states import InstanceState, ModelState, NodeState, Tier, TierState
from sllmctl.cluster.plans import Plan
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node, PlacementRecord
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities
from sllmctl.planner.planner import LocalityPlanner

_GB = 10**9
_NOW = 10_000.0
_DEVICE_BYTES = 80 * _GB
_SIZES = ((8, 1), (14, 1), (26, 1), (60, 2))
"""GB of weights and devices of a model."""


class BusyJournals:
    """Each busy instance has the sequences that were drawn for it. ``known``: it can be told when they end."""

    def __init__(self, *, known: bool) -> None:
        self.known = known
        self.sequences: dict[str, tuple[int, ...]] = {}

    def tokens(self, instance: str) -> Sequence[int]:
        return self.sequences.get(instance, ())

    def remaining_s(self, instance: str) -> float:
        return 0.02 * max(self.sequences.get(instance, (0,))) if self.known else 0.0

    def wait_s(self, model: str) -> float | None:
        return None


class Cluster:
    """The view, and the changes that a running cluster would make to it. ``full``: nothing may leave."""

    def __init__(self, nodes: int, models: int, seed: int, *, full: bool = False) -> None:
        self._full = full
        self.draw = random.Random(seed)
        self.view = ClusterView()
        self.journals = BusyJournals(known=not full)
        self.settings = ControlSettings()
        self.estimates = Estimates(self.settings)
        self.names = [f"model-{number:05d}" for number in range(models)]
        self._count = 0
        self._add_nodes(nodes)
        self._add_models()
        self._place(nodes)
        for number in range(nodes):
            self._fill(f"node-{number:04d}")

    def _add_nodes(self, count: int) -> None:
        devices = tuple(DeviceInfo(index=index, kind="cuda", name="gpu", memory_bytes=_DEVICE_BYTES) for index in range(8))
        for number in range(count):
            name = f"node-{number:04d}"
            self.view.add_node(Node(name, name, "unix:/x", NodeState.READY, False, 0.0, _NOW))
            inventory = Inventory(
                hostname=name,
                cpus=64,
                memory_bytes=2048 * _GB,
                devices=devices,
                arena=ArenaInfo(id="a", budget_bytes=1024 * _GB, chunk_bytes=32 << 20),
                disk_read_bps=self.draw.uniform(4e9, 8e9),
                device_copy_bps=self.draw.uniform(20e9, 50e9),
            )
            self.view.set_inventory(name, inventory)

    def _add_models(self) -> None:
        for number, name in enumerate(self.names):
            size, devices = _SIZES[number % len(_SIZES)]
            self.view.add_checkpoint(Checkpoint(f"d{number:05d}", "Model", size * _GB, 40_000 * size, 4096, 0.0))
            spec = ModelSpec(
                name=name,
                source=PathSource("/m"),
                devices=devices,
                scale=ScaleSpec(max=8, max_concurrency=16),
                engine=EngineSpec(kv_bytes=(2 + size // 8) * _GB),
            )
            model = Model(spec, ModelState.DEPLOYED, f"d{number:05d}", None, None, None, 0.0, 0.0)
            model.heat, model.heat_at = self.draw.paretovariate(1.2) - 1.0, _NOW - self.draw.uniform(0, 1800)
            self.view.add_model(model)

    def _place(self, nodes: int) -> None:
        for number in range(len(self.names)):
            digest, size = f"d{number:05d}", _SIZES[number % len(_SIZES)][0] * _GB
            where = self.draw.sample(range(nodes), min(20, nodes))
            for at, node in enumerate(where):
                self._put(digest, f"node-{node:04d}", Tier.DISK, 0, size)
                if at < 2:
                    self._put(digest, f"node-{node:04d}", Tier.DRAM, 0, size)

    def _put(self, digest: str, node: str, tier: Tier, device: int, size: int, users: int = 0) -> None:
        self.view.put_placement(PlacementRecord(digest, node, tier, device, TierState.RESIDENT, size, users))

    def _fill(self, node: str) -> None:
        """Instances and idle weights until forty draws find no room."""
        misses = 0
        while misses < 40:
            number = self.draw.randrange(len(self.names))
            size, count = _SIZES[number % len(_SIZES)]
            inventory = self.view.nodes[node].inventory
            assert inventory is not None
            free = sorted(
                ((self.view.memory.free_bytes(node, device), device.index) for device in inventory.devices), reverse=True
            )
            need = size * _GB // count
            idle = not self._full and self.draw.random() < 0.4
            if free[count - 1][0] < need + (0 if idle else (2 + size // 8) * _GB):
                misses += 1
                continue
            devices = tuple(sorted(index for _, index in free[:count]))
            digest = f"d{number:05d}"
            if not idle:
                self.start(self.names[number], digest, node, devices, (2 + size // 8) * _GB)
            for device in devices:
                self._put(digest, node, Tier.DEVICE, device, need, 0 if idle else 1)

    def start(self, model: str, digest: str, node: str, devices: tuple[int, ...], kv_bytes: int) -> Instance:
        self._count += 1
        instance = Instance(
            id=f"inst-{self._count:06d}", model=model, node=node, digest=digest, epoch=Epoch(1), state=InstanceState.STARTING,
            devices=devices, working_bytes=kv_bytes, restarts=0, retry_at=None, fault=None, phases=None, reason="",
            created_at=0.0, changed_at=0.0, served=True, ready_at=_NOW - 600,
        )  # fmt: skip
        self.view.add_instance(instance)
        self.view.set_state(instance, InstanceState.READY)
        if not self._full and self.draw.random() < 0.33:
            self.view.set_activity(instance, 0, _NOW - self.draw.uniform(0, 60))
        else:
            self._busy(instance)
        if self.draw.random() < 0.01:
            checkpoint, where = self.view.checkpoints[digest], self.view.nodes[node]
            self.estimates.began(instance.id, where, checkpoint, devices, Tier.DISK, "", _NOW)
        return instance

    def _busy(self, instance: Instance) -> None:
        sequences = tuple(self.draw.randint(50, 2000) for _ in range(self.draw.randint(1, 8)))
        self.journals.sequences[instance.id] = sequences
        self.view.set_activity(instance, len(sequences), None)

    def stir(self) -> None:
        """What happens between two plans: some instances become busy, or rest, or others run on them."""
        for _ in range(4):
            instance = self.view.instances[f"inst-{self.draw.randint(1, self._count):06d}"]
            if instance.running and not self._full:
                self.journals.sequences.pop(instance.id, None)
                self.view.set_activity(instance, 0, _NOW - self.draw.uniform(0, 60))
            else:
                self._busy(instance)


def measure(cluster: Cluster, planner: LocalityPlanner, plans: int) -> tuple[list[float], Counter[str]]:
    """Milliseconds of each plan, and what was decided."""
    spans: list[float] = []
    kinds: Counter[str] = Counter()
    for _ in range(plans):
        cluster.stir()
        model = cluster.view.models[cluster.draw.choice(cluster.names)]
        began = time.thread_time()
        found = planner.plan(model, _NOW)
        spans.append(1000 * (time.thread_time() - began))
        kinds[_kind(found) if isinstance(found, Plan) else type(found).__name__.lower()] += 1
    return spans, kinds


def _kind(plan: Plan) -> str:
    best = plan.best
    for kind, those in (("moves", best.moves), ("drains", best.drains), ("stops", best.stops), ("drops", best.drops)):
        if those:
            return kind
    return "free"


def _report(
    report: Report, cluster: Cluster, args: argparse.Namespace, title: str, abilities: Abilities, aims: tuple[str, str]
) -> None:
    """``aims``: of the mean, and of the 99th percentile."""
    gc.collect()
    gc.freeze()
    planner = LocalityPlanner(cluster.view, cluster.estimates, cluster.journals, cluster.settings, abilities)
    measure(cluster, planner, 200)
    figures: dict[str, list[float]] = {"mean": [], "p50": [], "p99": [], "max": []}
    kinds: Counter[str] = Counter()
    for _ in range(args.rounds):
        spans, decided = measure(cluster, planner, args.plans)
        kinds += decided
        figures["mean"].append(statistics.fmean(spans))
        for name, at in (("p50", 50), ("p99", 99)):
            figures[name].append(statistics.quantiles(spans, n=100)[at - 1])
        figures["max"].append(max(spans))
    for name, values in figures.items():
        aim = {"mean": aims[0], "p99": aims[1]}.get(name, "")
        report.row(f"{title}, {name} of {args.plans} plans", values, "ms", f"aim {aim}" if aim else "")
    report.note(f"{title}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--plans", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report("a placement decision")
    cluster = Cluster(args.nodes, args.models, args.seed)
    size = f"{len(cluster.view.nodes)} nodes, {len(cluster.view.models)} models, {len(cluster.view.instances)} instances"
    report.note(f"{size}, seed {args.seed}")
    _report(report, cluster, args, "without migration", Abilities(), ("0.2", "1"))
    _report(report, cluster, args, "with migration", Abilities(migrate=True), ("", "5"))
    gc.unfreeze()
    cluster = Cluster(args.nodes, args.models, args.seed, full=True)
    _report(report, cluster, args, "refused", Abilities(), ("", ""))
    if args.out is not None:
        report.save(args.out)


if __name__ == "__main__":
    main()

"""What the dashboard and its event stream cost: 500 nodes, 5,000 instances, 200 changes a second, and nothing at all.

Made and drawn for a terminal of 200 x 50 that is not there: every line is computed, nothing is written to a device.

    python -m bench.dashboard [--seconds 10] [--out bench/results/DATE-dashboard.json]

A refresh is one frame of changes taken in, the view filtered, sorted and all its lines computed, in processor time. Shares are
of one core. The feed is the manager's side: a turn in which 50 instances changed, and the first picture, made a part at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from bench.report import Report
from schema.admin import InstanceView, ModelView, NodeView, RequestTimeline, RequestView, StatusView, StreamFrame
from schema.ids import Epoch
from schema.link import ArenaInfo, DeviceInfo, InstanceTruth, Inventory
from schema.spec import ModelSpec, PathSource
from schema.states import InstanceState, ModelState, NodeState, RequestState
from sllmctl.client import AsyncAdminClient
from sllmctl.cluster.changes import PutInstance
from sllmctl.cluster.records import Checkpoint, Instance, Model, Node
from sllmctl.cluster.view import ClusterView
from sllmctl.config import ClientSettings, StreamSettings
from sllmctl.gateway.admin.feed import Feed
from sllmctl.gateway.admin.picture import KINDS
from tui.app import Dashboard

NODES, INSTANCES, MODELS, REQUESTS, CHANGES_PER_S = 500, 5000, 200, 1000, 200
FRAMES_PER_S = 4
SIZE = (200, 50)
DIGEST = "ab" * 32
_MEANS = Inventory(
    hostname="box",
    cpus=64,
    memory_bytes=1 << 40,
    devices=tuple(DeviceInfo(index=index, kind="cuda", name="H100", memory_bytes=80 << 30) for index in range(8)),
    arena=ArenaInfo(id="a", budget_bytes=512 << 30, chunk_bytes=4 << 20, used_bytes=200 << 30),
    disk_budget_bytes=8 << 40,
    disk_used_bytes=2 << 40,
)
_SPECS = [ModelSpec(name=f"model-{number:03d}", source=PathSource("/m")) for number in range(MODELS)]
_STATUS = StatusView(
    cluster="c",
    generation=1,
    version="bench",
    pid=1,
    started_at=0.0,
    api_url="http://x",
    ready=True,
    nodes_ready=NODES,
    nodes=NODES,
)


def picture(now: float) -> StreamFrame:
    """A whole cluster."""
    return StreamFrame(
        cursor="b-1",
        at=now,
        fresh=True,
        status=_STATUS,
        nodes=tuple(
            NodeView(
                id=f"node_{number}",
                name=f"node-{number:03d}",
                address="unix:/x",
                state=NodeState.READY,
                cordoned=False,
                seen_at=now,
                instances=10,
                inventory=_MEANS,
                device_used_bytes=tuple(random.randrange(80 << 30) for _ in range(8)),
            )
            for number in range(NODES)
        ),
        models=tuple(
            ModelView(
                name=spec.name,
                state=ModelState.DEPLOYED,
                digest=DIGEST,
                spec=spec,
                instances={"ready": 25},
                waiting=0,
                running=9,
                fault=None,
                progress=None,
                created_at=now,
            )
            for spec in _SPECS
        ),
        instances=tuple(_instance(number, now) for number in range(INSTANCES)),
        requests=tuple(_request(number, now) for number in range(REQUESTS)),
    )


def _instance(number: int, now: float) -> InstanceView:
    return InstanceView(
        id=f"inst_{number:05d}",
        model=_SPECS[number % MODELS].name,
        node=f"node-{number % NODES:03d}",
        digest=DIGEST,
        state=InstanceState.READY,
        devices=(number % 8,),
        epoch=5,
        restarts=0,
        retry_at=None,
        pid=7,
        running=1,
        working_bytes=1 << 30,
        kv_used_tokens=random.randrange(60_000),
        kv_capacity_tokens=65_536,
        phases=None,
        progress=None,
        fault=None,
        reason="weights are in DRAM",
        created_at=now,
        changed_at=now,
    )


def _request(number: int, now: float) -> RequestView:
    return RequestView(
        id=f"req_{number:06d}",
        model=_SPECS[number % MODELS].name,
        state=RequestState.RUNNING,
        instance=f"inst_{number:05d}",
        attempts=1,
        prompt_tokens=100,
        generated_tokens=random.randrange(500),
        orphaned=False,
        received_at=now - number / 10,
        timeline=RequestTimeline(cold=False, routed_s=0.001, first_token_s=0.05),
    )


class _Manager(AsyncAdminClient):
    """Tells a whole picture, then as many changes as it is asked for."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), ClientSettings())
        self.changing = False
        self.told = 0

    async def follow(self, *_: Any) -> AsyncGenerator[StreamFrame, None]:
        yield picture(time.time())
        while True:
            await asyncio.sleep(1 / FRAMES_PER_S)
            if self.changing:
                yield self.changes()

    def changes(self) -> StreamFrame:
        now, count = time.time(), CHANGES_PER_S // FRAMES_PER_S
        self.told += count
        return StreamFrame(
            cursor=f"b-{self.told}",
            at=now,
            instances=tuple(_instance(random.randrange(INSTANCES), now) for _ in range(count // 2)),
            requests=tuple(_request(random.randrange(REQUESTS), now) for _ in range(count - count // 2)),
        )


async def _share(seconds: float) -> float:
    """The share of a core that this process takes."""
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - began)


async def dashboard(report: Report, seconds: float) -> None:
    """Each view that changes, in turn."""
    manager = _Manager()
    app = Dashboard(lambda: manager)
    async with app.run_test(size=SIZE) as pilot:
        while len(app.cluster.instances) < INSTANCES:
            await pilot.pause(0.05)
        for name in ("cluster", "models", "instances", "requests"):
            app.jump(name)
            await pilot.pause(1.0)
            manager.changing = False
            idle = await _share(seconds)
            manager.changing = True
            before = app.redraws
            busy = await _share(seconds)
            redraws = app.redraws - before
            manager.changing = False
            await pilot.pause(0.5)
            samples: list[float] = []
            for _ in range(40):
                frame = manager.changes()
                began = time.process_time()
                app.cluster.apply(frame)
                app._redraw()
                for y in range(app.grid.size.height):
                    app.grid.render_line(y)
                samples.append((time.process_time() - began) * 1000)
                await pilot.pause()
            report.row(f"{name}: one refresh", samples, "ms", "< 100")
            report.row(f"{name}: core, {CHANGES_PER_S} changes/s, {redraws / seconds:.1f} refreshes/s", [busy * 100], "%")
            report.row(f"{name}: core, nothing changes", [idle * 100], "%", "< 10")


class _Live:
    """A router of which nothing lives, and no events."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: {"model_counts": (0, 0), "loads": [], "moving": [], "requests": []}.get(name)

    async def events(self, *_: Any, **__: Any) -> list[Any]:
        return []


async def feed(report: Report) -> None:
    """The manager's side: the first picture, and turns of 50 changed instances."""
    view = ClusterView()
    for number in range(NODES):
        view.add_node(Node(f"node_{number}", f"node-{number:03d}", "unix:/x", NodeState.READY, False, 1.0, 2.0))
        view.set_inventory(f"node_{number}", _MEANS)
    view.add_checkpoint(Checkpoint(DIGEST, "LlamaForCausalLM", 4096, 64, 512, 5.0))
    for spec in _SPECS:
        view.add_model(Model(spec, ModelState.DEPLOYED, DIGEST, None, None, None, 10.0, 11.0))
    made = []
    for number in range(INSTANCES):
        state, node = InstanceState.READY, f"node_{number % NODES}"
        name, model = f"inst_{number:05d}", _SPECS[number % MODELS].name
        one = Instance(name, model, node, DIGEST, Epoch(5), state, (number % 8,), 1024, 0, None, None, None, "room", 20.0, 21.0)
        view.add_instance(one)
        made.append(one)
    live: Any = _Live()
    manager = Feed(view=view, live=live, database=live, status=lambda: _STATUS, settings=StreamSettings(every_s=60.0))
    frames = manager.read(None, frozenset(KINDS))
    began = time.process_time()
    parts = 1
    while (frame := await anext(frames)) is not None and frame.more:
        parts += 1
    first_ms = (time.process_time() - began) * 1000
    samples, idle = [], []
    for turn in range(50):
        for _ in range(CHANGES_PER_S // FRAMES_PER_S):
            one = random.choice(made)
            one.restarts += 1
            truth = InstanceTruth(instance=one.id, epoch=one.epoch, digest=DIGEST, state=one.state, devices=one.devices)
            manager.committed([PutInstance(truth, one.model, one.node, 1024, turn, None, "room", 20.0, 21.0)])
        assert manager._picture is not None
        began = time.process_time()
        await manager._look_at_all(manager._picture)
        samples.append((time.process_time() - began) * 1000)
        began = time.process_time()
        await manager._look_at_all(manager._picture)
        idle.append((time.process_time() - began) * 1000)
    await frames.aclose()
    await manager.close_feed()
    report.row(f"feed: the first picture, in {parts} parts", [first_ms], "ms")
    report.row("feed: a turn with 50 changed instances", samples, "ms")
    report.row("feed: a turn in which nothing changed", idle, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    report = Report(f"dashboard: {NODES} nodes, {INSTANCES} instances, {REQUESTS} requests, {SIZE[0]} x {SIZE[1]}")
    asyncio.run(dashboard(report, options.seconds))
    asyncio.run(feed(report))
    if options.out is not None:
        report.save(options.out)


if __name__ == "__main__":
    main()

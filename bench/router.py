"""What the router alone costs a request, from its submission to its end, by how many instances its model has.

    python -m bench.router [--requests 20000] [--rounds 3]

Models, nodes and instances are told to the router as the control loop and the links would tell it; what it sends is dropped.
Each instance holds four sequences on average, and each reply comes as one message with its end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from schema.ids import EpochCounter, epoch_of
from schema.link import (
    ArenaInfo,
    Ended,
    EngineTiming,
    Inventory,
    ManagerMessage,
    NodeTruth,
    SamplingParams,
    Submit,
    TokenRun,
    Tokens,
    TruthEnd,
)
from schema.spec import ModelSpec, PathSource
from schema.states import EndReason, InstanceState, ModelState
from sllmctl.control.effects import ModelChanged, RouteChanged
from sllmctl.gateway.router import Router
from sllmctl.gateway.router_settings import RouterSettings

_NODES, _LOAD, _CONCURRENCY = 100, 4, 16
_PROMPT, _REPLY = tuple(range(200)), tuple(range(100))
_TIMING = EngineTiming(prefill_s=0.1, first_token_s=0.1, total_s=2.0, steps=len(_REPLY))


class _Timer:
    def cancel(self) -> None:
        pass


class _World:
    """A router with ready instances all around; ``submitted`` is what runs."""

    def __init__(self, models: int, instances: int) -> None:
        self.now, self.ids = 1e9, 0
        self.submitted: list[tuple[str, Submit]] = []
        self.router = Router(
            send=self._send,
            post=lambda event: None,
            epochs=EpochCounter(7),
            ids=self._id,
            settings=RouterSettings(),
            clock=lambda: self.now,
            call_later=lambda delay_s, call: _Timer(),
        )
        arena = ArenaInfo(id="a", budget_bytes=1, chunk_bytes=1)
        inventory = Inventory(hostname="h", cpus=1, memory_bytes=1, devices=(), arena=arena)
        for number in range(_NODES):
            self.router.truth_began(f"n{number}", NodeTruth(node=f"n{number}", inventory=inventory))
            self.router.truth_ended(f"n{number}", TruthEnd(attempts=0))
        for name in (f"m{number}" for number in range(models)):
            spec = ModelSpec(name=name, source=PathSource("/m"))
            self.router.model_changed(ModelChanged(name, spec, ModelState.DEPLOYED, "d", 4096))
            for number in range(instances):
                self.router.route_changed(
                    RouteChanged(
                        name,
                        f"n{number % _NODES}",
                        f"{name}-{number}",
                        epoch_of(1, 1),
                        InstanceState.READY,
                        True,
                        100_000,
                        4096,
                        _CONCURRENCY,
                        f"n{number % _NODES}",
                    )
                )

    def _send(self, node: str, message: ManagerMessage) -> None:
        if isinstance(message, Submit):
            self.submitted.append((node, message))

    def _id(self, kind: str) -> str:
        self.ids += 1
        return f"{kind}_{self.ids}"


def _request_us(models: int, instances: int, requests: int) -> float:
    world, rng, params = _World(models, instances), random.Random(1), SamplingParams(max_tokens=len(_REPLY))
    running = world.submitted
    began = time.perf_counter()
    for _ in range(requests):
        world.now += 0.01
        world.router.submit(f"m{rng.randrange(models)}", _PROMPT, params)
        if len(running) > models * instances * _LOAD:
            node, submit = running.pop(rng.randrange(len(running)))
            end = Ended(attempt=submit.attempt, position=len(_REPLY), reason=EndReason.LENGTH, timing=_TIMING)
            world.router.tokens(node, Tokens(frame=1, runs=(TokenRun(submit.attempt, 0, _REPLY),), ends=(end,)))
            world.router.batch_ended(node)
    return 1e6 * (time.perf_counter() - began) / requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"medians of {args.rounds} rounds of {args.requests} requests, submitted and ended")
    for models, instances in ((200, 1), (20, 10), (1, 200)):
        us = statistics.median(_request_us(models, instances, args.requests) for _ in range(args.rounds))
        print(f"{models:4} models with {instances:4} instances each: {us:6.1f} us a request")


if __name__ == "__main__":
    main()

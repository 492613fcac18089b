"""Whatever happens to instances, links and clients, in whatever order: each stream is exact, and nothing is left counted.

The model of a node below holds attempts as an agent does. A sequence's tokens follow from its prompt and position alone, so
the one right stream is known beforehand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schema.ids import Epoch, epoch_of
from schema.link import Acked, AttemptTruth, Cancel, Ended, Submit, TokenRun
from schema.states import EndReason, InstanceState
from sllmctl.gateway.journal import Request
from sllmctl.gateway.router_settings import RouterSettings
from tests.examples import examples
from tests.sllmctl.gateway.routing import Bench, params

NODES = ("n", "o")
LENGTH = 20


def right_token(prompt: tuple[int, ...], choice: int, position: int) -> int:
    return (prompt[0] * 31 + choice * 17 + position * 7) % 1000


@dataclass
class Held:
    """One attempt on a node: all its tokens so far, how many were said, and its end."""

    submit: Submit
    tokens: list[int]
    said: int
    end: Ended | None = None
    end_said: bool = False


@dataclass
class NodeModel:
    up: bool = True
    epoch: int = 1
    alive: bool = True
    held: dict[Epoch, Held] = field(default_factory=dict)


class RouterMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.bench = Bench(RouterSettings(max_attempts=10_000))
        self.bench.model(queue_limit=1000)
        self.nodes = {name: NodeModel() for name in NODES}
        self.requests: list[Request] = []
        self.finishes: dict[tuple[str, int], EndReason] = {}
        self.seen: dict[tuple[str, int], list[int]] = {}
        for name in NODES:
            self.bench.node(name)
            self.route(name, InstanceState.READY)
        for seed in (1, 2, 3):
            self.submit(choices=2, seed=seed)

    def route(self, name: str, state: InstanceState) -> None:
        node = self.nodes[name]
        self.bench.instance(f"i-{name}", node=name, epoch=epoch_of(1, node.epoch), state=state, concurrency=3)
        self.deliver()

    def deliver(self) -> None:
        """What the router sent reaches the nodes, unless their link is down."""
        while self.bench.sent:
            name, message = self.bench.sent.pop(0)
            node = self.nodes[name]
            if not node.up:
                continue
            if isinstance(message, Submit):
                held = Held(message, list(message.generated), len(message.generated))
                node.held.setdefault(message.attempt, held)
                if not node.alive or message.instance_epoch != epoch_of(1, node.epoch):
                    self.finish(held, EndReason.LOST)
            elif isinstance(message, Cancel) and (held := node.held.get(message.attempt)) and held.end is None:
                self.finish(held, EndReason.CANCELLED)
            elif isinstance(message, Acked):
                for epoch in message.ends:
                    node.held.pop(epoch, None)

    def finish(self, held: Held, reason: EndReason) -> None:
        held.end = Ended(attempt=held.submit.attempt, position=len(held.tokens), reason=reason)

    # --- what may happen

    @rule(choices=st.integers(1, 2), seed=st.integers(1, 900))
    @precondition(lambda self: len(self.requests) < 12)
    def submit(self, choices: int, seed: int) -> None:
        self.requests.append(self.bench.router.submit("m", (seed,), params(LENGTH), choices))
        self.deliver()

    @rule(name=st.sampled_from(NODES), counts=st.lists(st.integers(0, 4), min_size=1, max_size=6), said=st.booleans())
    def step(self, name: str, counts: list[int], said: bool) -> None:
        """The engine makes tokens, and ends at the full length; the node says so, or has not come to it yet."""
        if not self.nodes[name].alive:
            return
        for held, count in zip(self.nodes[name].held.values(), itertools.cycle(counts), strict=False):
            if held.end is None:
                self.grow(held, count)
        if said:
            self.say(name, 0)

    def grow(self, held: Held, count: int) -> None:
        for _ in range(min(count, LENGTH - len(held.tokens))):
            held.tokens.append(right_token(held.submit.prompt, held.submit.choice, len(held.tokens)))
        if len(held.tokens) == LENGTH:
            self.finish(held, EndReason.LENGTH)

    @rule(name=st.sampled_from(NODES), again=st.integers(0, 9))
    def say(self, name: str, again: int) -> None:
        """The node says what is new, and now and then some of it again."""
        node = self.nodes[name]
        if not node.up:
            return
        runs, ends = [], []
        for held in node.held.values():
            start = max(len(held.submit.generated), held.said - again)
            if held.tokens[start:]:
                runs.append(TokenRun(held.submit.attempt, start, tuple(held.tokens[start:])))
            held.said = len(held.tokens)
            if held.end is not None and (not held.end_said or again):
                ends.append(held.end)
                held.end_said = True
        if runs or ends:
            self.bench.tokens(*runs, *ends, node=name)
            self.deliver()

    @rule(name=st.sampled_from(NODES))
    def lose_link(self, name: str) -> None:
        if self.nodes[name].up:
            self.nodes[name].up = False
            self.bench.router.link_lost(name)
            self.deliver()

    @rule(name=st.sampled_from(NODES), forget=st.booleans())
    def reconnect(self, name: str, forget: bool) -> None:
        """A truth of all that is held; ``forget``: the agent died and took with it what it had not passed on."""
        node = self.nodes[name]
        if node.up:
            return
        if forget and node.held:
            del node.held[next(reversed(node.held))]
        truths = []
        for held in node.held.values():
            held.said, held.end_said = len(held.tokens), held.end is not None
            new = tuple(held.tokens[len(held.submit.generated) :])
            truths.append(AttemptTruth(submit=held.submit, new_ids=new, end=held.end))
        node.up = True
        self.bench.node(name, tuple(truths))
        self.deliver()

    @rule(name=st.sampled_from(NODES), told=st.booleans())
    def kill_worker(self, name: str, told: bool) -> None:
        """All of the instance's attempts are lost; the control loop may know before the ends are said."""
        node = self.nodes[name]
        if not node.alive:
            return
        node.alive = False
        for held in node.held.values():
            if held.end is None:
                self.finish(held, EndReason.LOST)
        if told:
            self.route(name, InstanceState.BACKOFF)

    @rule(name=st.sampled_from(NODES))
    def restart_worker(self, name: str) -> None:
        node = self.nodes[name]
        if not node.alive:
            node.alive = True
            node.epoch += 1
            self.route(name, InstanceState.READY)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.requests:
            data.draw(st.sampled_from(self.requests)).cancel()
            self.deliver()

    # --- what must hold

    @invariant()
    def streams_are_exact(self) -> None:
        for request in getattr(self, "requests", []):
            for sequence in request.sequences:
                key = (request.id, sequence.choice)
                right = [right_token(sequence.prompt, sequence.choice, n) for n in range(len(sequence.tokens))]
                assert sequence.tokens == right
                assert sequence.failure is None
                before = self.seen.get(key, [])
                assert sequence.tokens[: len(before)] == before
                if key in self.finishes:
                    assert sequence.finish == self.finishes[key]
                    assert sequence.tokens == before
                elif sequence.finish is not None:
                    self.finishes[key] = sequence.finish
                    assert sequence.finish == EndReason.CANCELLED or len(sequence.tokens) == LENGTH
                self.seen[key] = list(sequence.tokens)

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        # Everything heals and runs to its end: then nothing may be left.
        for _ in range(40):
            for name in NODES:
                self.reconnect(name, forget=False)
                self.restart_worker(name)
                for held in self.nodes[name].held.values():
                    if held.end is None:
                        self.grow(held, LENGTH)
                self.say(name, again=0)
        self.streams_are_exact()
        assert len(self.finishes) == sum(len(request.sequences) for request in self.requests)
        assert self.bench.router.live == 0
        assert self.bench.router.model_counts("m") == (0, 0)
        assert [self.bench.router.instance_running(f"i-{name}") for name in NODES] == [0, 0]
        assert [list(node.held) for node in self.nodes.values()] == [[], []]
        assert self.bench.timers == 0


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(
    max_examples=examples(100),
    stateful_step_count=50,
    print_blob=True,
)

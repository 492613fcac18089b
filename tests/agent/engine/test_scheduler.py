"""The scheduler alone: turns, budget, and that every sequence gets done, whatever the memory."""

from __future__ import annotations

import random

from agent.engine.blocks import BlockManager
from agent.engine.scheduler import Plan, Scheduler
from agent.engine.sequence import Sequence
from tests.agent.engine.models import submit_of


class _Drive:
    """Steps without a model: what is planned counts as computed, and each whole sequence gets a token. ``first_token`` and
    ``ended`` say in which step."""

    def __init__(self, blocks: int = 4096, rows: int = 16, budget: int = 64) -> None:
        self.blocks = BlockManager(blocks, rows, blocks, lambda _: None)
        self.scheduler = Scheduler(self.blocks, budget)
        self.budget = budget
        self.steps = 0
        self.first_token: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.submitted = 0

    def submit(self, prompt: int | list[int], tokens: int = 4, tenant: str = "") -> int:
        self.submitted += 1
        ids = [self.submitted] * prompt if isinstance(prompt, int) else prompt
        sequence = Sequence(submit_of(self.submitted, ids, tokens, tenant=tenant))
        self.scheduler.add(sequence)
        return self.submitted

    def step(self) -> Plan:
        self.steps += 1
        plan = self.scheduler.plan()
        tokens = sum(size for _, size in plan.prefills)
        assert tokens <= max(self.budget - len(plan.decodes), self.budget // 4, 1)
        assert all(size > 0 for _, size in plan.prefills)
        assert len({*plan.decodes, *(sequence for sequence, _ in plan.prefills)}) == len(plan.decodes) + len(plan.prefills)
        for sequence, size in [*((decode, 1) for decode in plan.decodes), *plan.prefills]:
            sequence.cached += size
            assert sequence.cached <= len(sequence.blocks) * 16
            if sequence.cached == len(sequence.tokens):
                self.blocks.publish(sequence)
                self.first_token.setdefault(sequence.attempt, self.steps)
                if sequence.append(0) is not None:
                    self.ended[sequence.attempt] = self.steps
                    self.scheduler.remove(sequence)
        for sequence in plan.full:
            self.ended[sequence.attempt] = self.steps
        return plan

    def run(self, limit: int = 10_000) -> None:
        while len(self.ended) < self.submitted:
            self.step()
            assert self.steps < limit
        assert (len(self.scheduler.waiting), len(self.scheduler.running), self.blocks.used_tokens) == (0, 0, 0)


def test_every_sequence_gets_done_whatever_comes_and_goes() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(15):
        drive = _Drive(blocks=rng.randint(4, 40), rows=rng.randint(1, 8), budget=rng.randint(1, 100))
        longest = drive.blocks.total * 16
        for _ in range(60):
            if rng.random() < 0.5:
                prompt = [rng.randint(0, 1)] * rng.randint(1, longest // 2)
                drive.submit(prompt, rng.randint(1, longest), rng.choice(["", "a", "b"]))
            else:
                drive.step()
            if rng.random() < 0.1 and (live := [*drive.scheduler.running, *drive.scheduler.waiting.turns()]):
                cancelled = rng.choice(live)
                drive.scheduler.remove(cancelled)
                drive.ended[cancelled.attempt] = drive.steps
        drive.run(limit=100_000)  # many times the tokens that were asked for: by one at a time all of it takes 20,000


def test_tenants_take_turns_however_much_one_sends() -> None:
    drive = _Drive(rows=2)
    flood = [drive.submit(20, 4, "flood") for _ in range(40)]
    drive.step()
    polite = [drive.submit(20, 4, "polite") for _ in range(5)]
    drive.run()
    done = max(drive.ended[attempt] for attempt in polite)
    assert sum(drive.ended[attempt] < done for attempt in flood) <= 8
    assert [drive.ended[attempt] for attempt in flood] == sorted(drive.ended[attempt] for attempt in flood)


def test_a_tenant_of_many_tokens_waits_longer_than_one_of_few() -> None:
    drive = _Drive(rows=1)
    long = [drive.submit(200, 4, "long") for _ in range(6)]
    short = [drive.submit(10, 4, "short") for _ in range(6)]
    drive.run()
    assert max(drive.ended[attempt] for attempt in short) < drive.ended[long[2]]


def test_short_prompts_pass_a_long_one_which_is_not_starved_by_them() -> None:
    drive = _Drive(budget=64)
    long = drive.submit(640)
    drive.step()
    short = drive.submit(30)
    drive.step()
    assert drive.first_token[short] == 2
    for _ in range(60):
        if long not in drive.first_token:
            drive.submit(30, 1)
            drive.step()
    assert drive.first_token[long] <= 20, "half of the budget is its own"


def test_prompts_go_on_beside_however_many_decode() -> None:
    drive = _Drive(rows=64, budget=32)
    for _ in range(40):
        drive.submit(1, 200)
    for _ in range(3):
        drive.step()
    late = drive.submit(40)
    for _ in range(8):
        plan = drive.step()
        assert len(plan.decodes) >= 40
    assert drive.first_token[late] <= 3 + 5


def test_choices_of_one_request_compute_their_prompt_once() -> None:
    drive = _Drive()
    prompt = list(range(100))
    choices = [drive.submit(prompt, 8) for _ in range(5)]
    computed = 0
    while len(drive.ended) < 5:
        computed += sum(size for _, size in drive.step().prefills)
        held = drive.blocks.used_tokens
    assert computed == 100 + 4 * (100 - 96)
    assert held <= (6 + 5 * 2) * 16
    assert drive.first_token[choices[1]] == drive.first_token[choices[4]] == drive.first_token[choices[0]] + 1


def test_out_of_blocks_the_newest_gives_way_and_goes_on_from_what_is_cached() -> None:
    drive = _Drive(blocks=8, rows=4)
    first, second = drive.submit(40, 60), drive.submit(40, 60)
    drive.run()
    assert drive.ended[first] < drive.ended[second]

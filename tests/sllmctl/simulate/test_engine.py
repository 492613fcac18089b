"""The engine in closed form against one that computes every single step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest

from schema.ids import Epoch
from schema.states import EndReason
from sllmctl.simulate.engine import BLOCK_TOKENS, Compute, Engine, Job
from sllmctl.simulate.kernel import Kernel
from sllmctl.simulate.scenario import Speed

SPEED = Speed(
    prefill_base_s=0.011, prefill_token_s=0.00031, decode_step_s=0.0203, decode_sequence_s=0.00017, decode_token_s=0.0000019
)


@dataclass
class Asked:
    """One attempt: when it comes, its prompt and what it makes."""

    at: float
    prompt: int
    output: int
    name: str = ""


@dataclass
class Heard:
    """What an engine said: when the first token of each attempt was there, and when and how it ended, with how many tokens."""

    kernel: Kernel
    first: dict[str, float] = field(default_factory=dict)
    ends: dict[str, tuple[float, EndReason, int]] = field(default_factory=dict)

    def first_token(self, job: Job) -> None:
        self.first[job.key] = self.kernel.now

    def ended(self, engine: Engine, ends: list[tuple[Job, EndReason]]) -> None:
        for job, reason in ends:
            assert job.key not in self.ends
            self.ends[job.key] = (self.kernel.now, reason, job.made)


@dataclass
class Row:
    asked: Asked
    made: int = 0

    @property
    def tokens(self) -> int:
        return self.asked.prompt + self.made


def step_by_step(
    asked: list[Asked], speed: Speed, capacity: int, concurrency: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The same rules, one step after another: (first tokens, ends)."""
    coming = deque(sorted(asked, key=lambda one: one.at))
    waiting: deque[Row] = deque()
    running: list[Row] = []
    first: dict[str, float] = {}
    ends: dict[str, float] = {}
    now = 0.0
    while coming or waiting or running:
        while coming and coming[0].at <= now:
            waiting.append(Row(coming.popleft()))
        if not waiting and not running:
            now = coming[0].at
            continue
        used = sum(row.tokens for row in running)
        if (
            waiting
            and len(running) < concurrency
            and (not running or used + waiting[0].tokens + BLOCK_TOKENS * len(running) <= capacity)
        ):
            row = waiting.popleft()
            now += speed.prefill_base_s + row.tokens * speed.prefill_token_s
            row.made += 1
            first.setdefault(row.asked.name, now)
            if row.made == row.asked.output:
                ends[row.asked.name] = now
            else:
                running.append(row)
            continue
        if used <= capacity:
            now += speed.decode_step_s + len(running) * speed.decode_sequence_s + used * speed.decode_token_s
            for row in list(running):
                row.made += 1
                if row.made == row.asked.output:
                    ends[row.asked.name] = now
                    running.remove(row)
        while sum(row.tokens for row in running) > capacity:
            waiting.appendleft(running.pop())
    return first, ends


def draw(random: Random, count: int, span_s: float, capacity: int) -> list[Asked]:
    asked = [
        Asked(random.uniform(0, span_s), random.randint(1, capacity // 2), random.randint(1, capacity // 2))
        for _ in range(count)
    ]
    asked.sort(key=lambda one: one.at)
    for number, one in enumerate(asked):
        one.name = f"r{number}"
    return asked


def job_of(kernel: Kernel, number: int, one: Asked) -> Job:
    return Job(Epoch(number + 1), one.name, one.prompt, 0, one.output, kernel.now)


def ask(kernel: Kernel, engine: Engine, asked: list[Asked]) -> None:
    for number, one in enumerate(asked):
        kernel.at(one.at, lambda number=number, one=one: engine.submit(job_of(kernel, number, one)))  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(60))
def test_it_ends_where_steps_one_by_one_end(seed: int) -> None:
    random = Random(seed)
    capacity, concurrency = random.choice([(400, 32), (3000, 4), (100_000, 64), (600, 8)])
    speed = SPEED if seed % 3 else Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.02)
    asked = draw(random, 60, random.choice([1.0, 20.0, 300.0]), min(capacity, 800))
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), speed, capacity, concurrency, heard)
    ask(kernel, engine, asked)
    kernel.run(lambda: False)
    first, ends = step_by_step(asked, speed, capacity, concurrency)
    assert heard.first.keys() == first.keys()
    for name, at in first.items():
        assert heard.first[name] == pytest.approx(at, abs=1e-6)
    assert heard.ends.keys() == ends.keys()
    for number, one in enumerate(asked):
        at, reason, made = heard.ends[one.name]
        assert (reason, made) == (EndReason.STOP, one.output), number
        assert at == pytest.approx(ends[one.name], abs=1e-6)
    assert engine.empty
    assert engine.tokens == engine.kept == 0


def test_it_puts_the_newest_off_when_its_memory_is_full() -> None:
    """The drawn ones above meet this too; here it is certain."""
    asked = [Asked(0.0, 100, 90, "a"), Asked(0.001, 100, 90, "b")]
    first, ends = step_by_step(asked, SPEED, 300, 8)
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), SPEED, 300, 8, heard)
    ask(kernel, engine, asked)
    kernel.run(lambda: "a" in heard.ends)
    assert "b" in heard.first
    assert len(engine.waiting) + (engine.prefilling is not None) == 1
    kernel.run(lambda: False)
    assert {name: end[0] for name, end in heard.ends.items()} == pytest.approx(ends, abs=1e-6)
    assert heard.first == pytest.approx(first, abs=1e-6)


def test_what_it_has_made_is_known_at_any_time() -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.01, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), speed, 10_000, 8, heard)
    asked = Asked(0.0, 10, 50, "a")
    engine.submit(job_of(kernel, 0, asked))
    made: list[int] = []
    for at in (0.05, 0.09, 0.15, 0.25, 1.05, 4.95):
        kernel.at(at, lambda: made.extend(job.made for job in engine.advance()))
    kernel.run(lambda: False)
    assert made == [0, 0, 1, 2, 10, 49]
    assert heard.ends["a"] == (pytest.approx(0.1 + 4.9), EndReason.STOP, 50)


def test_looking_changes_nothing() -> None:
    random = Random(5)
    asked = draw(random, 40, 10.0, 600)
    ends: list[dict[str, tuple[float, EndReason, int]]] = []
    for looks in (0, 300):
        kernel = Kernel()
        heard = Heard(kernel)
        engine = Engine(kernel, (Compute(kernel),), SPEED, 3000, 16, heard)
        ask(kernel, engine, asked)
        for _ in range(looks):
            kernel.at(random.uniform(0, 30), engine.advance)  # type: ignore[arg-type]
        kernel.run(lambda: False)
        ends.append(heard.ends)
    for name, (at, reason, made) in ends[0].items():
        assert ends[1][name] == (pytest.approx(at, abs=1e-6), reason, made)


def test_busy_engines_share_their_device() -> None:
    """Two that do the same take twice as long; one that is left alone goes on at full speed."""
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    device = Compute(kernel)
    engines = [Engine(kernel, (device,), speed, 10_000, 8, heard) for _ in range(2)]
    engines[0].submit(job_of(kernel, 0, Asked(0.0, 100, 11, "short")))
    engines[1].submit(job_of(kernel, 1, Asked(0.0, 100, 21, "long")))
    kernel.run(lambda: False)
    assert heard.first == pytest.approx({"short": 0.2, "long": 0.2})
    assert heard.ends["short"][0] == pytest.approx(2.2)
    assert heard.ends["long"][0] == pytest.approx(3.2)
    assert device.busy_s == pytest.approx(3.2)


def test_one_over_several_devices_goes_as_fast_as_the_fullest() -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    devices = (Compute(kernel), Compute(kernel))
    wide = Engine(kernel, devices, speed, 10_000, 8, heard)
    narrow = Engine(kernel, devices[1:], speed, 10_000, 8, heard)
    wide.submit(job_of(kernel, 0, Asked(0.0, 100, 11, "wide")))
    narrow.submit(job_of(kernel, 1, Asked(0.0, 100, 11, "narrow")))
    kernel.run(lambda: False)
    assert heard.ends["wide"][0] == heard.ends["narrow"][0] == pytest.approx(2.2)


@pytest.mark.parametrize(("engines", "slower"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0)])
def test_engines_that_leave_half_of_a_device_idle_slow_each_other_from_the_third_on(engines: int, slower: float) -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1, occupancy=0.5)
    kernel = Kernel()
    heard = Heard(kernel)
    device = Compute(kernel)
    for number in range(engines):
        one = Engine(kernel, (device,), speed, 10_000, 8, heard)
        one.submit(job_of(kernel, number, Asked(0.0, 100, 11, f"r{number}")))
    kernel.run(lambda: False)
    assert [end[0] for end in heard.ends.values()] == pytest.approx([1.1 * slower] * engines)
    assert device.busy_s == pytest.approx(1.1 * slower)


def test_a_cancelled_one_ends_with_its_step() -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), speed, 10_000, 1, heard)
    engine.submit(job_of(kernel, 0, Asked(0.0, 100, 50, "runs")))
    engine.submit(job_of(kernel, 1, Asked(0.0, 100, 50, "waits")))
    kernel.at(0.55, lambda: engine.cancel(Epoch(2)))
    kernel.at(0.65, lambda: engine.cancel(Epoch(1)))
    kernel.run(lambda: False)
    assert heard.ends["waits"] == (pytest.approx(0.55), EndReason.CANCELLED, 0)
    assert heard.ends["runs"] == (pytest.approx(0.7), EndReason.CANCELLED, 7)
    assert engine.empty
    assert engine.tokens == 0


def test_what_was_prefilled_ahead_is_not_prefilled_again() -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), speed, 3000, 8, heard)
    warmed: list[float] = []
    engine.warm("a", 1000, lambda: warmed.append(kernel.now))
    kernel.at(1.5, lambda: engine.warm("a", 1200, lambda: warmed.append(kernel.now)))
    kernel.at(2.0, lambda: engine.submit(Job(Epoch(1), "a", 500, 710, 800, kernel.now)))
    kernel.run(lambda: False)
    assert warmed == pytest.approx([1.0, 1.7])
    assert heard.first["a"] == pytest.approx(2.01)
    assert engine.tokens == engine.kept == 0


def test_what_was_prefilled_ahead_makes_way() -> None:
    speed = Speed(prefill_base_s=0.0, prefill_token_s=0.001, decode_step_s=0.1)
    kernel = Kernel()
    heard = Heard(kernel)
    engine = Engine(kernel, (Compute(kernel),), speed, 1000, 8, heard)
    engine.warm("a", 600, lambda: None)
    engine.warm("b", 100, lambda: None)
    kernel.at(1.0, lambda: engine.submit(job_of(kernel, 0, Asked(1.0, 800, 50, "c"))))
    kernel.run(lambda: False)
    assert heard.first["c"] == pytest.approx(1.8)
    assert engine.held == {"b": 100}
    engine.forget("b")
    assert engine.kept == 0

"""Virtual time: the order of calls, cancelled ones, and the control loop's steps in it."""

from __future__ import annotations

from random import Random
from typing import cast

from sllmctl.cluster.changes import RowChange
from sllmctl.control.effects import Effect, Log, Step, WakeAt
from sllmctl.control.events import Event, InstanceActivity, Tick
from sllmctl.control.loop import ControlLoop
from sllmctl.simulate.kernel import Kernel, LoopRunner


def never() -> bool:
    return False


def test_calls_come_in_order_of_time_and_then_of_asking() -> None:
    kernel = Kernel()
    said: list[tuple[float, str]] = []

    def say(name: str) -> None:
        said.append((kernel.now, name))

    def first() -> None:
        say("first")
        kernel.soon(lambda: say("after first"))
        kernel.at(1.0, lambda: say("late for its time"))
        kernel.call_later(0.5, lambda: say("later"))

    kernel.at(2.0, first)
    kernel.at(2.0, lambda: say("second"))
    kernel.at(1.5, lambda: say("before"))
    kernel.run(never)
    assert said == [
        (1.5, "before"),
        (2.0, "first"),
        (2.0, "after first"),
        (2.0, "late for its time"),
        (2.0, "second"),
        (2.5, "later"),
    ]
    assert kernel.events == 6


def test_cancelled_calls_are_not_made_however_many() -> None:
    kernel = Kernel()
    random = Random(1)
    made: list[int] = []
    timers = [kernel.at(random.random(), lambda number=number: made.append(number)) for number in range(20_000)]  # type: ignore[misc]
    kept = set(random.sample(range(20_000), 500))
    for number, timer in enumerate(timers):
        if number not in kept:
            timer.cancel()
            timer.cancel()
    kernel.run(never)
    assert set(made) == kept
    assert len(made) == 500
    timers[made[0]].cancel()


def test_it_stops_when_it_is_asked_to() -> None:
    kernel = Kernel()
    for at in range(10):
        kernel.at(float(at), lambda: None)
    kernel.run(lambda: kernel.now >= 4)
    assert kernel.now == 4.0
    kernel.run(never)
    assert kernel.now == 9.0


class Scripted:
    """A loop that says what it is told to at each event."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, Event]] = []
        self.steps: list[Step] = []

    def begin(self, now: float) -> Step:
        return self.steps.pop(0)

    def step(self, event: Event, now: float) -> Step:
        self.heard.append((now, event))
        return self.steps.pop(0) if self.steps else Step()


def test_the_loop_is_driven_as_its_runner_drives_it() -> None:
    kernel = Kernel()
    loop = Scripted()
    performed: list[tuple[float, Effect]] = []
    rows: list[RowChange] = []
    one, two, three = (InstanceActivity(name, 1) for name in ("one", "two", "three"))

    def perform(effect: Effect) -> None:
        performed.append((kernel.now, effect))
        if effect == Log("info", "a"):
            runner.post(three)

    runner = LoopRunner(cast(ControlLoop, loop), kernel, perform, rows.extend)
    loop.steps = [Step([], [WakeAt(9.0)]), Step([], [Log("info", "a")]), Step([], [Log("info", "b"), WakeAt(5.0)])]
    runner.begin()
    kernel.at(1.0, lambda: runner.post(one))
    kernel.at(1.0, lambda: runner.post(two))

    def both() -> None:
        runner.post(one)
        runner.post(two)

    kernel.at(2.0, both)
    kernel.run(never)
    # Each at its own instant of asking; those of one call together, all steps before any effect; then the one wake-up left.
    assert loop.heard == [(1.0, one), (1.0, three), (1.0, two), (2.0, one), (2.0, two), (5.0, Tick())]
    assert [effect for _, effect in performed] == [Log("info", "a"), Log("info", "b")]

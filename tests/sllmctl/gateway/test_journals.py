"""What the router tells the planner: tokens, what is left to run, how long others wait; and the prefills it tells of."""

from __future__ import annotations

import random

import pytest

from schema.link import EngineTiming, Submit
from schema.states import EndReason, InstanceState
from sllmctl.control.events import PrefillTimed
from sllmctl.gateway.router_settings import RouterSettings
from sllmctl.planner.interface import Journals
from tests.sllmctl.gateway.routing import Bench, end, params, run


def timing(first_s: float = 1.0, token_s: float = 0.1, tokens: int = 11, prefill_s: float = 0.0) -> EngineTiming:
    return EngineTiming(prefill_s=prefill_s, first_token_s=first_s, total_s=first_s + token_s * (tokens - 1), steps=tokens)


def taught(concurrency: int = 64) -> Bench:
    """A model whose replies have 11 tokens: one second until the first, a tenth for each of the others."""
    bench = Bench(RouterSettings(reply_smoothing=1.0))
    bench.node()
    bench.model()
    bench.instance(concurrency=concurrency)
    serve(bench, 11)
    return bench


def serve(bench: Bench, tokens: int, **more: float) -> None:
    bench.router.submit("m", (1, 2), params(100))
    (submit,) = bench.take(Submit)
    bench.tokens(run(submit, *[5] * tokens), end(submit, tokens, EndReason.STOP, timing=timing(tokens=tokens, **more)))


def test_before_anything_ran_nothing_is_known() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    journals: Journals = bench.router.journals
    assert (list(journals.tokens("i")), journals.remaining_s("i"), journals.wait_s("m")) == ([], 0.0, 0.0)
    assert journals.wait_s("never heard of") == 0.0
    bench.router.submit("m", (1,), params())
    assert journals.wait_s("m") is None, "one waits, and no instance is there"
    bench.instance(concurrency=1)
    bench.router.submit("m", (1,), params())
    assert journals.wait_s("m") is None, "no reply has ended yet"
    bench.now += 3
    assert journals.remaining_s("i") == 3.0, "as long again as it has run"


def test_tokens_are_those_of_the_journals() -> None:
    bench = taught()
    bench.router.submit("m", (1, 2, 3), params())
    given_up = bench.router.submit("m", (1,), params())
    bench.router.submit("m", (1,), params())
    first, _, last = bench.take(Submit)
    bench.tokens(run(last, 5, 6, 7))
    given_up.cancel()
    assert list(bench.router.journals.tokens("i")) == [3, 4]
    bench.tokens(end(first, 0, EndReason.STOP))
    assert list(bench.router.journals.tokens("i")) == [4]


def test_an_instance_goes_on_until_its_last_sequence_ends() -> None:
    bench = taught()
    journals = bench.router.journals
    assert journals.remaining_s("i") == 0.0
    bench.router.submit("m", (1,), params(100))
    (older,) = bench.take(Submit)
    assert journals.remaining_s("i") == pytest.approx(2.0)
    bench.now += 0.5
    assert journals.remaining_s("i") == pytest.approx(1.5), "by the time, while no token has come"
    bench.tokens(run(older, 5, 5))
    assert journals.remaining_s("i") == pytest.approx(1.0), "by its tokens, and half a reply is always to come"
    bench.router.submit("m", (1,), params(3))
    assert journals.remaining_s("i") == pytest.approx(1.2), "no longer than what was asked for"


def test_what_went_on_elsewhere_is_counted_from_there() -> None:
    bench = taught()
    bench.router.submit("m", (1, 2), params(100))
    (submit,) = bench.take(Submit)
    bench.tokens(run(submit, *[5] * 40))
    bench.instance("j")
    bench.instance(state=InstanceState.STOPPED)
    (again,) = bench.take(Submit)
    assert list(bench.router.journals.tokens("j")) == [42]
    assert bench.router.journals.remaining_s("j") == pytest.approx(2.0)
    bench.now += 60
    bench.tokens(
        run(again, *[5] * 21), end(again, 61, EndReason.STOP, timing=timing(first_s=2.0, token_s=0.2, tokens=21, prefill_s=1.5))
    )
    assert bench.events(PrefillTimed) == [PrefillTimed("j", 42, 1.5)]
    bench.router.submit("m", (1,), params(6))
    assert bench.router.journals.remaining_s("j") == pytest.approx(3.0), "21 tokens in 6 s taught it"


def test_the_last_who_waits_gets_a_place_after_those_before_it() -> None:
    bench = taught(concurrency=1)
    journals = bench.router.journals
    bench.router.submit("m", (1,), params(100))
    assert journals.wait_s("m") == 0.0
    bench.router.submit("m", (1,), params(100))
    assert journals.wait_s("m") == pytest.approx(2.0)
    bench.now += 0.5
    assert journals.wait_s("m") == pytest.approx(1.5)
    bench.router.submit("m", (1,), params(100))
    assert journals.wait_s("m") == pytest.approx(3.5)
    bench.instance("other", state=InstanceState.STARTING)
    assert journals.wait_s("m") == pytest.approx(3.5)
    bench.instance(reachable=False)
    assert journals.wait_s("m") is None


def test_waiting_agrees_with_a_line_that_is_played_out() -> None:
    """Against a replay of the line, service by service, where the ends of those who run lie evenly."""
    seed = 20
    rng = random.Random(seed)
    for _ in range(30):
        places, waiting, instances = rng.randint(1, 40), rng.randint(1, 90), rng.randint(1, 4)
        bench = taught(concurrency=places)
        for name in ("j", "k", "l")[: instances - 1]:
            bench.instance(name, concurrency=places)
        places *= instances
        for _ in range(places):
            bench.now += 2.0 / places
            bench.router.submit("m", (1,), params(100))
        ends = sorted(2.0 * (place + 1) / places for place in range(places))
        for _ in range(waiting):
            bench.router.submit("m", (1,), params(100))
            starts = ends.pop(0)
            ends.append(starts + 2.0)
        told = bench.router.journals.wait_s("m")
        assert told == pytest.approx(starts, abs=2.0 / places + 0.1), (seed, places, waiting)


def test_the_end_of_a_load_is_no_part_of_the_pace_nor_of_a_prefill() -> None:
    bench = taught(concurrency=1)
    bench.events(PrefillTimed)
    bench.now += 60
    bench.router.submit("m", (1, 2), params(100))
    (submit,) = bench.take(Submit)
    cold = EngineTiming(weights_s=7.0, prefill_s=1.0, first_token_s=8.0, total_s=9.0, steps=11)
    bench.tokens(run(submit, *[5] * 11), end(submit, 11, EndReason.STOP, timing=cold))
    assert bench.events(PrefillTimed) == [PrefillTimed("i", 2, 1.0)]
    bench.router.submit("m", (1,), params(11))
    assert bench.router.journals.remaining_s("i") == pytest.approx(2.0)


def test_a_prefill_is_told_of_by_the_tokens_that_were_computed() -> None:
    bench = taught(concurrency=1)
    bench.events(PrefillTimed)
    bench.now += 60
    bench.router.submit("m", (1,) * 100, params(11))
    (submit,) = bench.take(Submit)
    found = EngineTiming(prefill_s=0.5, first_token_s=0.5, total_s=1.0, steps=11, cached_tokens=96)
    bench.tokens(run(submit, *[5] * 11), end(submit, 11, EndReason.STOP, timing=found))
    assert bench.events(PrefillTimed) == [PrefillTimed("i", 4, 0.5)]


def test_a_few_prefills_are_told_of_and_never_all() -> None:
    bench = taught()
    bench.events(PrefillTimed)
    told = []
    for _ in range(1000):
        bench.now += 0.25
        serve(bench, 11, prefill_s=0.5)
        told += [bench.now - 1000.0 for _ in bench.events(PrefillTimed)]
    assert told == [0.25, 1.25, 3.25, 7.25, 15.25, 31.25, 63.25, 123.25, 183.25, 243.25]


def test_ends_without_a_first_token_or_without_timing_teach_nothing() -> None:
    bench = taught(concurrency=1)
    for reply in ((), (5,)):
        bench.router.submit("m", (1,), params(100))
        (submit,) = bench.take(Submit)
        wrong = EngineTiming(total_s=500.0, first_token_s=400.0 * len(reply))
        bench.tokens(run(submit, *reply), end(submit, len(reply), EndReason.CANCELLED, timing=wrong))
    bench.router.submit("m", (1,), params(11))
    assert bench.router.journals.remaining_s("i") == pytest.approx(2.0)

"""A model's line: turns by tenant, and the router that serves by them."""

from __future__ import annotations

import random

from schema.link import SamplingParams, Submit
from schema.states import EndReason
from sllmctl.gateway.journal import Request, Sequence
from sllmctl.gateway.line import Line
from tests.sllmctl.gateway.routing import Bench, end, params


def _sequence(tenant: str) -> Sequence:
    request = Request("r", "m", SamplingParams(max_tokens=1), 0.0, lambda _: None, tenant=tenant)
    return Sequence(request, 0, (1,))


def test_a_line_agrees_with_a_brute_force_twin() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    line, returned, waiting, served = Line(), list[Sequence](), list[Sequence](), dict[str, int]()
    for _ in range(3_000):
        choice = rng.random()
        if choice < 0.45:
            tenant = rng.choice("abcd")
            if tenant not in served:
                served[tenant] = min(served.values(), default=0)
            waiting.append(_sequence(tenant))
            line.add(waiting[-1])
        elif choice < 0.5:
            returned.insert(0, _sequence(rng.choice("abcd")))
            line.add(returned[0], front=True)
        elif choice < 0.6 and waiting:
            gone = waiting.pop(rng.randrange(len(waiting)))
            line.remove(gone)
        elif returned:
            assert line.first() is returned[0]
            line.remove(returned.pop(0), 7)
        elif waiting:
            tokens = rng.randint(1, 50)
            turn = min(waiting, key=lambda each: served[each.request.tenant])
            assert line.first() is turn
            served[turn.request.tenant] += tokens
            waiting.remove(turn)
            line.remove(turn, tokens)
        served = {tenant: tokens for tenant, tokens in served.items() if any(s.request.tenant == tenant for s in waiting)}
        assert len(line) == len(waiting) + len(returned)
        assert bool(line) == bool(waiting or returned)
        assert set(line) == {*waiting, *returned}
        assert all(each in line for each in (*waiting, *returned))


def test_users_take_turns_at_an_instance_however_much_one_sends() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    bench.instance(concurrency=1)
    for tenant in ("flood", "flood", "flood", "flood", "polite", "polite"):
        bench.router.submit("m", (1, 2), params(4), tenant=tenant)
    order = []
    while submits := [message for _, message in bench.sent if isinstance(message, Submit)]:
        bench.sent.clear()
        (submit,) = submits
        order.append(submit.tenant)
        bench.tokens(end(submit, 0, EndReason.STOP))
    assert order[0] == "flood", "there was room when it came"
    assert order[1:] == ["flood", "polite", "flood", "polite", "flood"]

from __future__ import annotations

from schema.admin import RequestTimeline
from schema.link import EngineTiming, StartPhases
from schema.states import Tier
from sllmctl.cli.demo import phases
from sllmctl.cli.phases import engine_text


def test_a_cold_start_is_split_and_its_queue_is_what_the_start_did_not_take() -> None:
    start = StartPhases(
        load_s=0.2,
        loaded_from=Tier.DISK,
        loaded_bytes=8 << 20,
        fork_s=0.01,
        build_s=0.1,
        attach_s=0.02,
        warm_s=0.03,
        total_s=0.4,
    )
    engine = EngineTiming(prefill_s=0.05, first_token_s=0.06)
    timeline = RequestTimeline(cold=True, routed_s=0.5, first_token_s=0.6, ended_s=1.0, start=start, engine=engine)
    rows = {name: (round(seconds, 6), remark) for name, seconds, remark in phases(timeline)}
    assert list(rows) == ["queue", "load", "worker", "prefill", "first token"]
    assert rows["queue"][0] == 0.1
    assert rows["load"] == (0.2, "8.0 MiB from disk")
    assert rows["worker"][0] == 0.16
    assert "fork 10 ms, build 0.10 s, attach 20 ms, warm 30 ms" in rows["worker"][1]
    assert rows["prefill"][0] == 0.05
    assert rows["first token"][0] == 0.6


def test_a_prefill_that_waited_for_the_end_of_the_load_says_so() -> None:
    engine = EngineTiming(weights_s=0.2, prefill_s=0.05, first_token_s=0.25, total_s=1.0, steps=4)
    rows = {name: seconds for name, seconds, _ in phases(RequestTimeline(cold=True, first_token_s=0.3, engine=engine))}
    assert rows == {"weights": 0.2, "prefill": 0.05, "first token": 0.3}
    text = "queued 0 ms, waited for weights 0.20 s, prefill 50 ms, first token 0.25 s, total 1.00 s, 4 steps"
    assert engine_text(engine) == text


def test_phases_that_are_not_known_are_left_out() -> None:
    assert phases(RequestTimeline(cold=False)) == []
    assert [name for name, *_ in phases(RequestTimeline(cold=False, first_token_s=0.1))] == ["first token"]


def test_a_queue_is_never_negative() -> None:
    timeline = RequestTimeline(cold=True, routed_s=0.1, start=StartPhases(total_s=0.4))
    assert phases(timeline)[0][:2] == ("queue", 0.0)

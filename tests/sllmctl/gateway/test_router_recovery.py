"""Sequences outlive what they run on: lost instances, broken links, restarted agents and managers."""

from __future__ import annotations

import pytest

from schema.errors import Conflict, Unreachable
from schema.ids import Epoch, epoch_of
from schema.link import Acked, AttemptTruth, Cancel, EngineCounts, EngineTiming, InstanceLoad, Submit
from schema.states import EndReason, InstanceState, ModelState, RequestState
from sllmctl.control.events import InstanceActivity
from sllmctl.gateway.router_settings import RouterSettings
from tests.sllmctl.gateway.routing import GENERATION, Bench, end, params, run


def orphan(counter: int = 9, choice: int = 0, request: str = "req_old") -> Submit:
    return Submit(
        attempt=epoch_of(3, counter), instance="i", instance_epoch=epoch_of(1, 1), request=request, model="m", choice=choice,
        prompt=(1, 2), generated=(5,), params=params(100),
    )  # fmt: skip


def test_a_lost_attempt_goes_on_elsewhere_from_its_journal_before_those_in_line() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    bench.instance("a", concurrency=1)
    first = bench.router.submit("m", (1,), params())
    (old,) = bench.take(Submit)
    bench.router.submit("m", (2,), params())
    bench.tokens(run(old, 7, 8))
    bench.instance("a", state=InstanceState.BACKOFF)
    assert first.state == RequestState.WAITING
    bench.instance("b", concurrency=1)
    (new,) = bench.take(Submit)
    assert (new.request, new.instance, new.generated) == (first.id, "b", (7, 8))
    assert new.attempt > old.attempt
    bench.tokens(run(old, 99, start=2))
    bench.tokens(run(new, 9))
    assert first.sequences[0].tokens == [7, 8, 9]
    assert bench.router.instance_running("a") == 0


def test_sequences_lost_together_keep_their_order() -> None:
    bench = Bench()
    bench.warm()
    ids = [bench.router.submit("m", (n,), params()).id for n in range(1, 4)]
    bench.take(Submit)
    bench.instance(state=InstanceState.BACKOFF)
    bench.instance(epoch=epoch_of(1, 2))
    assert [submit.request for submit in bench.take(Submit)] == ids


def test_a_life_that_lost_an_attempt_gets_no_other_until_the_loop_has_spoken() -> None:
    bench = Bench()
    bench.warm()
    bench.router.submit("m", (1,), params())
    (first,) = bench.take(Submit)
    bench.tokens(run(first, 4), end(first, 1, EndReason.LOST))
    assert bench.take(Submit) == []
    bench.instance("other")
    (second,) = bench.take(Submit)
    assert (second.instance, second.generated) == ("other", (4,))
    bench.instance("other", epoch=epoch_of(1, 2))
    (third,) = bench.take(Submit)
    assert (third.instance_epoch, third.generated) == (epoch_of(1, 2), (4,))
    bench.instance("other", epoch=epoch_of(1, 1), state=InstanceState.STOPPED)
    assert bench.take(Submit) == []


def test_a_life_that_lost_an_attempt_is_used_again_when_it_is_said_to_be_ready() -> None:
    bench = Bench()
    bench.warm()
    bench.router.submit("m", (1,), params())
    (first,) = bench.take(Submit)
    bench.tokens(end(first, 0, EndReason.LOST))
    bench.instance()
    (second,) = bench.take(Submit)
    assert second.instance == first.instance


def test_attempts_of_one_sequence_are_bounded() -> None:
    bench = Bench(RouterSettings(max_attempts=2))
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    for _ in range(2):
        (submit,) = bench.take(Submit)
        bench.tokens(end(submit, 0, EndReason.LOST))
        bench.instance()
    assert bench.take(Submit) == []
    assert isinstance(request.sequences[0].failure, Unreachable)
    assert bench.router.instance_running("i") == 0


def test_attempts_that_bring_tokens_do_not_count_against_the_bound() -> None:
    bench = Bench(RouterSettings(max_attempts=2))
    bench.warm()
    request = bench.router.submit("m", (1,), params(100))
    for position in range(4):
        (submit,) = bench.take(Submit)
        bench.tokens(run(submit, 7), end(submit, position + 1, EndReason.LOST))
        bench.instance()
    assert request.sequences[0].tokens == [7] * 4
    assert len(bench.take(Submit)) == 1


def test_a_lost_attempt_that_had_all_its_tokens_is_finished() -> None:
    bench = Bench()
    bench.warm()
    long = bench.router.submit("m", (1,), params(2))
    stopped = bench.router.submit("m", (1,), params(5, stop_token_ids=(3,)))
    one, two = bench.take(Submit)
    bench.tokens(run(one, 8, 9), run(two, 8, 3))
    bench.instance(state=InstanceState.FAILED)
    assert long.sequences[0].finish == EndReason.LENGTH
    assert stopped.sequences[0].finish == EndReason.STOP
    assert bench.router.live == 0


def test_a_sequence_lost_after_its_model_was_stopped_fails() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    bench.model(state=ModelState.STOPPED)
    assert request.state == RequestState.RUNNING
    bench.instance(state=InstanceState.STOPPED)
    assert isinstance(request.sequences[0].failure, Conflict)
    assert bench.router.instance_running("i") == 0


def test_a_broken_link_only_makes_wait_and_the_truth_brings_what_was_missed() -> None:
    bench = Bench()
    bench.warm()
    kept = bench.router.submit("m", (1,), params())
    ended = bench.router.submit("m", (2,), params())
    died = bench.router.submit("m", (3,), params())
    one, two, three = bench.take(Submit)
    bench.tokens(run(one, 4), run(two, 4), run(three, 4))
    bench.router.link_lost("n")
    waiting = bench.router.submit("m", (4,), params())
    assert (kept.state, waiting.state) == (RequestState.RUNNING, RequestState.WAITING)
    assert bench.take(Submit) == []
    timing = EngineTiming(steps=2)
    bench.node(attempts=(
        AttemptTruth(submit=one, new_ids=(4, 5, 6)),
        AttemptTruth(submit=two, new_ids=(4, 5), end=end(two, 2, EndReason.STOP, timing=timing)),
    ))  # fmt: skip
    assert kept.sequences[0].tokens == [4, 5, 6]
    assert (ended.sequences[0].tokens, ended.sequences[0].finish) == ([4, 5], EndReason.STOP)
    sent = [message for _, message in bench.sent]
    assert Acked(frame=0, ends=(two.attempt,)) in sent
    resumed, fresh = bench.take(Submit)
    assert (resumed.request, resumed.generated) == (died.id, (4,))
    assert (fresh.request, fresh.generated) == (waiting.id, ())
    assert ended.timeline().engine == timing


def test_a_cancel_that_died_with_the_link_is_said_again_after_the_truth() -> None:
    bench = Bench()
    bench.warm()
    alive = bench.router.submit("m", (1,), params())
    gone = bench.router.submit("m", (1,), params())
    one, _ = bench.take(Submit)
    bench.router.link_lost("n")
    alive.cancel()
    gone.cancel()
    bench.sent.clear()
    bench.node(attempts=(AttemptTruth(submit=one, new_ids=(4, 5)),))
    assert bench.take(Cancel) == [Cancel(attempt=one.attempt)]
    assert alive.sequences[0].tokens == []
    assert bench.router.instance_running("i") == 1
    bench.tokens(end(one, 2, EndReason.CANCELLED))
    assert bench.router.instance_running("i") == 0


@pytest.mark.parametrize(("life", "counted"), [(epoch_of(GENERATION - 1, 1), 5), (epoch_of(GENERATION, 1), 12)])
def test_what_an_engine_did_for_an_earlier_manager_is_not_counted_again(life: Epoch, counted: int) -> None:
    bench = Bench()
    bench.node()
    bench.model()
    bench.instance(epoch=life)
    for decoded in (7, 12):
        counts = EngineCounts(decode_tokens=decoded)
        bench.router.instance_load_changed(
            "n", InstanceLoad(instance="i", epoch=life, running=1, waiting=0, kv_used_tokens=9, counts=counts)
        )
    samples = [sample for family in bench.router.engines.families({"m"}) for sample in family.samples]
    assert [each.value for each in samples if each.name == "sllm_engine_decode_tokens_total"] == [counted]


def test_unknown_live_attempts_are_cancelled_and_unknown_ends_acknowledged() -> None:
    bench = Bench()
    bench.warm()
    live, ended = orphan(1), orphan(2)
    bench.node(attempts=(AttemptTruth(submit=live), AttemptTruth(submit=ended, end=end(ended, 1))))
    sent = [message for _, message in bench.sent]
    assert Cancel(attempt=live.attempt) in sent
    assert Acked(frame=0, ends=(ended.attempt,)) in sent
    assert bench.router.live == 0


def test_the_first_truth_is_adopted_without_a_client_for_a_grace() -> None:
    bench = Bench(RouterSettings(orphan_grace_s=30.0))
    bench.model()
    stale, newest, other = orphan(8), orphan(9), orphan(4, choice=1)
    done = orphan(2, request="req_done")
    bench.node(attempts=(
        AttemptTruth(submit=newest, new_ids=(6, 7)),
        AttemptTruth(submit=stale),
        AttemptTruth(submit=other),
        AttemptTruth(submit=done, new_ids=(6,), end=end(done, 2, EndReason.STOP)),
    ))  # fmt: skip
    sent = [message for _, message in bench.sent]
    assert sent == [Cancel(attempt=stale.attempt), Acked(frame=0, ends=(done.attempt,))]
    (view,) = bench.router.requests()
    assert (view.id, view.orphaned, view.generated_tokens, view.instance) == ("req_old", True, 4, "i")
    assert view.node == "n", "its name is not known before the control loop has spoken"
    assert bench.events(InstanceActivity) == [InstanceActivity("i", 2)]
    bench.instance()
    bench.tokens(run(newest, 8, start=3))
    (view,) = bench.router.requests()
    assert (view.generated_tokens, view.node) == (5, "n.example")
    bench.sent.clear()
    bench.advance(30.0)
    assert [cancel.attempt for cancel in bench.take(Cancel)] == [newest.attempt, other.attempt]
    bench.tokens(end(newest, 4, EndReason.CANCELLED), end(other, 1, EndReason.CANCELLED))
    assert bench.router.request("req_old").state == RequestState.CANCELLED
    assert bench.router.instance_running("i") == 0


def test_an_adopted_sequence_that_ends_by_itself_is_acknowledged_and_needs_no_grace() -> None:
    bench = Bench()
    bench.model()
    submit = orphan()
    bench.node(attempts=(AttemptTruth(submit=submit),))
    bench.tokens(end(submit, 1, EndReason.STOP))
    assert submit.attempt in bench.take(Acked)[-1].ends
    assert bench.timers == 0
    assert bench.router.live == 0


def test_an_adopted_sequence_that_is_lost_is_not_run_again() -> None:
    bench = Bench()
    bench.model()
    submit = orphan()
    bench.node(attempts=(AttemptTruth(submit=submit),))
    bench.instance("i", state=InstanceState.BACKOFF)
    bench.instance("other")
    assert bench.take(Submit) == []
    assert bench.router.live == 0


def test_only_the_first_truth_adopts() -> None:
    bench = Bench()
    bench.model()
    bench.node()
    bench.node(attempts=(AttemptTruth(submit=orphan()),))
    assert bench.take(Cancel) == [Cancel(attempt=epoch_of(3, 9))]
    assert bench.router.live == 0


@pytest.mark.parametrize("broken_off", [False, True])
def test_a_truth_that_breaks_off_decides_nothing(broken_off: bool) -> None:
    bench = Bench()
    bench.warm()
    bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    if broken_off:
        bench.router.link_lost("n")
        bench.router.truth_began("n", bench.node_truth())
        bench.router.link_lost("n")
    bench.node(attempts=(AttemptTruth(submit=submit, new_ids=(4,)),))
    assert bench.take(Submit) == []
    assert bench.router.requests()[0].generated_tokens == 1

"""Requests through the router: admission, queueing, routing, streaming, ends."""

from __future__ import annotations

import asyncio
import struct

import pytest

from schema.errors import (
    Cancelled,
    Conflict,
    ContextOverflow,
    Fault,
    InvalidInput,
    LinkError,
    NotFound,
    OutOfSpace,
    Overloaded,
    SllmError,
    TimedOut,
    Unreachable,
    Unschedulable,
)
from schema.ids import EpochCounter, epoch_of, system_ids
from schema.link import Acked, Cancel, EngineTiming, InstanceLoad, Progress, StartPhases, Submit, TokenRun
from schema.spec import ModelSpec, PathSource
from schema.states import EndReason, InstanceState, ModelState, RequestState
from sllmctl.control.effects import ModelChanged, RejectWaiting
from sllmctl.control.events import DemandChanged, Event, InstanceActivity
from sllmctl.gateway.router import Router
from sllmctl.gateway.router_settings import RouterSettings
from tests.sllmctl.gateway.routing import Bench, end, params, run


async def failure_of(request: object) -> SllmError:
    with pytest.raises(SllmError) as caught:
        await asyncio.wait_for(request.sequences[0].wait(0), 30)  # type: ignore[attr-defined]
    return caught.value


def test_a_warm_request_is_submitted_at_once_without_timer_or_demand() -> None:
    bench = Bench()
    bench.warm()
    bench.events(object)
    request = bench.router.submit("m", (1, 2, 3), params())
    (submit,) = bench.take(Submit)
    assert (submit.prompt, submit.generated, submit.request, submit.instance) == ((1, 2, 3), (), request.id, "i")
    assert bench.events(object) == [InstanceActivity("i", 1)]
    assert bench.timers == 0


async def test_tokens_reach_a_waiting_consumer_and_the_end_finishes() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params(3))
    (submit,) = bench.take(Submit)
    sequence = request.sequences[0]
    reader = asyncio.ensure_future(sequence.wait(0))
    await asyncio.sleep(0)
    assert not reader.done()
    bench.now += 0.5
    bench.tokens(run(submit, 11, 12))
    await asyncio.wait_for(reader, 60)
    assert sequence.tokens == [11, 12]
    assert sequence.finish is None
    bench.now += 0.5
    timing = EngineTiming(total_s=1.0, steps=3)
    bench.tokens(run(submit, 13, start=2), end(submit, 3, timing=timing))
    await asyncio.wait_for(sequence.wait(3), 60)
    assert (sequence.tokens, sequence.finish) == ([11, 12, 13], EndReason.LENGTH)
    timeline = request.timeline()
    assert (timeline.cold, timeline.routed_s, timeline.first_token_s, timeline.ended_s) == (False, 0.0, 0.5, 1.0)
    assert timeline.engine == timing
    view = bench.router.request(request.id)
    assert (view.state, view.generated_tokens, view.attempts) == (RequestState.FINISHED, 3, 1)
    assert bench.router.instance_running("i") == 0


def test_ends_are_acknowledged_at_once_and_credit_in_parts_of_the_window() -> None:
    bench = Bench()
    bench.warm()
    bench.router.submit("m", (1,), params(900))
    (submit,) = bench.take(Submit)
    for position in range(40):
        bench.tokens(run(submit, 5, start=position))
    (credit,) = bench.take(Acked)
    assert credit == Acked(frame=32)
    bench.tokens(end(submit, 40, EndReason.STOP))
    assert bench.take(Acked) == [Acked(frame=41, ends=(submit.attempt,))]


def test_repeated_runs_change_nothing_and_gaps_are_refused() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    bench.tokens(run(submit, 1, 2, 3))
    bench.tokens(run(submit, 2, 3, 4, start=1))
    assert request.sequences[0].tokens == [1, 2, 3, 4]
    with pytest.raises(LinkError):
        bench.tokens(run(submit, 9, start=5))
    with pytest.raises(LinkError):
        bench.tokens(end(submit, 5))
    assert request.sequences[0].tokens == [1, 2, 3, 4]
    assert request.sequences[0].finish is None


def test_unknown_attempts_say_nothing_and_their_ends_are_acknowledged() -> None:
    bench = Bench()
    bench.warm()
    stranger = epoch_of(3, 3)
    bench.tokens(TokenRun(stranger, 4, (1,)), end(Submit(
        attempt=stranger, instance="i", instance_epoch=epoch_of(1, 1), request="r", model="m", prompt=(1,), params=params()
    ), 5))  # fmt: skip
    assert bench.take(Acked) == [Acked(frame=1, ends=(stranger,))]


def test_admission_refuses_what_cannot_be_served() -> None:
    bench = Bench(RouterSettings(max_journal_tokens=20))
    with pytest.raises(NotFound):
        bench.router.submit("m", (1,), params())
    with pytest.raises(NotFound):
        bench.router.model("m")
    bench.model(context=100)
    with pytest.raises(InvalidInput):
        bench.router.submit("m", (), params())
    with pytest.raises(ContextOverflow):
        bench.router.submit("m", (1,) * 91, params(10))
    bench.router.submit("m", (1,) * 15, params(10))
    with pytest.raises(Overloaded, match="tokens are being served"):
        bench.router.submit("m", (1,) * 6, params(10))
    for state in (ModelState.STOPPED, ModelState.INGESTING, ModelState.FAILED):
        bench.model(state=state)
        with pytest.raises(Conflict):
            bench.router.submit("m", (1,), params())


def test_an_instance_that_takes_less_than_the_model_lowers_the_limit() -> None:
    bench = Bench()
    bench.node()
    bench.model(context=1000)
    assert bench.router.model("m").max_context_tokens == 1000
    early = bench.router.submit("m", (1,) * 50, params(900))
    hopeless = bench.router.submit("m", (1,) * 100, params(10))
    bench.instance(context=100)
    assert bench.router.model("m").max_context_tokens == 100
    (submit,) = bench.take(Submit)
    assert (submit.request, submit.params.max_tokens) == (early.id, 50)
    assert isinstance(hopeless.sequences[0].failure, ContextOverflow)
    with pytest.raises(ContextOverflow):
        bench.router.submit("m", (1,) * 50, params(51))


def test_requests_wait_in_line_and_demand_is_said_when_it_begins_changes_and_ends() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    first = bench.router.submit("m", (1,), params())
    second = bench.router.submit("m", (2,), params())
    third = bench.router.submit("m", (3,), params())
    assert bench.events(DemandChanged) == [DemandChanged("m", 1, 0)]
    assert bench.router.model_counts("m") == (3, 0)
    bench.advance(0.1)
    assert bench.events(DemandChanged) == [DemandChanged("m", 3, 0)]
    bench.instance(concurrency=2)
    submits = bench.take(Submit)
    assert [submit.request for submit in submits] == [first.id, second.id]
    bench.tokens(run(submits[0], 7), end(submits[0], 1, EndReason.STOP))
    assert [submit.request for submit in bench.take(Submit)] == [third.id]
    assert bench.events(DemandChanged) == [DemandChanged("m", 0, 2)]
    assert first.timeline().cold


def test_once_nothing_is_started_any_more_only_who_has_an_instance_goes_on() -> None:
    bench = Bench()
    bench.node()
    bench.model("cold")
    bench.model()
    bench.instance(concurrency=1)
    cold, runs, waits = (bench.router.submit(model, (1,), params()) for model in ("cold", "m", "m"))
    bench.router.start_nothing(OutOfSpace("the disk of the database is full"))
    late = bench.router.submit("cold", (1,), params())
    for request in (cold, late):
        assert isinstance(request.failure, Unreachable)
        assert "the disk of the database is full" in str(request.failure)
    (submit,) = bench.take(Submit)
    assert (submit.request, runs.failure) == (runs.id, None)
    bench.tokens(run(submit, 7), end(submit, 1, EndReason.STOP))
    assert [submit.request for submit in bench.take(Submit)] == [waits.id]


def test_a_cold_request_shows_the_phases_of_the_start_it_waited_for() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    request = bench.router.submit("m", (1,), params())
    bench.router.progressed("n", Progress(op="i", stage="load", done_bytes=5, total_bytes=10))
    bench.now += 2.0
    bench.router.progressed("n", Progress(op="i", stage="load", done_bytes=9, total_bytes=10))
    progress = bench.router.progress("i")
    assert progress is not None
    assert (progress.done_bytes, progress.rate_bps) == (9, 2.0)
    phases = StartPhases(load_s=1.5, total_s=2.0)
    bench.router.instance_started("i", epoch_of(1, 1), phases)
    bench.router.progress_ended("i")
    bench.instance()
    assert bench.router.progress("i") is None
    timeline = request.timeline()
    assert (timeline.cold, timeline.routed_s, timeline.start) == (True, 2.0, phases)
    bench.router.instance_load_changed(
        "n", InstanceLoad(instance="i", epoch=epoch_of(1, 1), running=1, waiting=0, kv_used_tokens=9)
    )
    load = bench.router.instance_load("i")
    assert load is not None
    assert load.kv_used_tokens == 9


def test_the_least_busy_instance_with_room_is_taken() -> None:
    bench = Bench()
    bench.node("n")
    bench.node("o")
    bench.model()
    bench.instance("a", node="n", kv=100)
    bench.instance("b", node="o", concurrency=1)
    bench.instance("far", node="unlinked")
    bench.instance("away", node="n", reachable=False)
    bench.instance("draining", node="n", state=InstanceState.DRAINING)
    for _ in range(4):
        bench.router.submit("m", (1,) * 30, params(10))
    assert [submit.instance for submit in bench.take(Submit)] == ["a", "b", "a"]
    assert bench.router.model_counts("m") == (1, 3)


def test_a_reply_is_not_cut_short_on_a_small_instance_while_a_larger_one_takes_it_whole() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    bench.instance("small", context=50)
    bench.instance("large", context=100, concurrency=2)
    for _ in range(3):
        bench.router.submit("m", (1,) * 40, params(20))
    bench.router.submit("m", (1,) * 40, params(10))
    assert [(submit.instance, submit.params.max_tokens) for submit in bench.take(Submit)] == [("large", 20), ("large", 20)]
    assert bench.router.model_counts("m") == (2, 2)


def test_an_idle_instance_takes_what_its_cache_alone_would_not() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    bench.instance(kv=20)
    bench.router.submit("m", (1,) * 15, params(10))
    assert len(bench.take(Submit)) == 1


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    bench = Bench()
    bench.model(queue_limit=2)
    for _ in range(2):
        bench.router.submit("m", (1,), params())
    with pytest.raises(Overloaded) as caught:
        bench.router.submit("m", (1,), params())
    assert caught.value.retry_after_s >= 1
    assert bench.router.live == 2


def test_without_a_queue_only_what_can_run_now_is_taken() -> None:
    bench = Bench()
    bench.node()
    bench.model(queue_limit=0)
    bench.instance(concurrency=1)
    bench.router.submit("m", (1,), params())
    with pytest.raises(Overloaded):
        bench.router.submit("m", (1,), params())


async def test_waiting_beyond_the_cold_start_timeout_fails() -> None:
    bench = Bench()
    bench.model()
    request = bench.router.submit("m", (1,), params())
    bench.advance(59.0)
    assert request.state == RequestState.WAITING
    bench.advance(1.0)
    error = await failure_of(request)
    assert isinstance(error, TimedOut)
    assert "cold_start_timeout_s" in str(error)
    assert bench.events(DemandChanged)[-1] == DemandChanged("m", 0, 0)
    assert bench.router.request(request.id).state == RequestState.FAILED


async def test_waiting_requests_are_told_when_nothing_can_come() -> None:
    bench = Bench()
    bench.model()
    rejected = bench.router.submit("m", (1,), params())
    bench.router.reject_waiting(RejectWaiting("m", Fault("unschedulable", "no node has 5 GB"), 42.5))
    error = await failure_of(rejected)
    assert isinstance(error, Unschedulable)
    assert error.retry_after_s == 42.5
    stopped = bench.router.submit("m", (1,), params())
    bench.model(state=ModelState.STOPPED)
    assert isinstance(await failure_of(stopped), Conflict)
    bench.model()
    removed = bench.router.submit("m", (1,), params())
    bench.router.model_changed(ModelChanged("m", None, ModelState.DELETING, None, 0))
    assert isinstance(await failure_of(removed), NotFound)
    assert bench.router.models() == []
    assert bench.timers == 0


async def test_an_error_of_one_choice_fails_the_request_and_cancels_the_others() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params(), choices=2)
    one, two = bench.take(Submit)
    assert (one.choice, two.choice) == (0, 1)
    bench.tokens(run(one, 4), end(one, 1, EndReason.ERROR, fault=Fault("out_of_space", "no blocks")))
    assert bench.take(Cancel) == [Cancel(attempt=two.attempt)]
    await request.sequences[0].wait(0)
    with pytest.raises(OutOfSpace):
        await request.sequences[0].wait(1)
    with pytest.raises(OutOfSpace):
        await request.sequences[1].wait(0)
    assert bench.router.instance_running("i") == 1
    bench.tokens(end(two, 0, EndReason.CANCELLED))
    assert bench.router.instance_running("i") == 0
    assert bench.events(InstanceActivity)[-1] == InstanceActivity("i", 0)


async def test_a_sequence_cancelled_by_its_node_fails() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    bench.tokens(end(submit, 0, EndReason.CANCELLED))
    assert isinstance(await failure_of(request), Cancelled)


def test_cancel_ends_a_running_request_at_once_and_drops_what_still_comes() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    bench.tokens(run(submit, 4))
    request.cancel()
    request.cancel()
    assert bench.take(Cancel) == [Cancel(attempt=submit.attempt)]
    assert request.sequences[0].finish == EndReason.CANCELLED
    bench.tokens(run(submit, 5, 6, start=1))
    assert request.sequences[0].tokens == [4]
    timing = EngineTiming(total_s=1.0, steps=4)
    bench.tokens(end(submit, 3, EndReason.CANCELLED, timing=timing))
    view = bench.router.request(request.id)
    assert (view.state, view.timeline.engine) == (RequestState.CANCELLED, timing)
    assert bench.router.live == 0
    with pytest.raises(Conflict, match="cancelled"):
        bench.router.cancel(request.id)
    with pytest.raises(NotFound):
        bench.router.cancel("req_none")


def test_a_cancelled_waiting_request_leaves_the_line() -> None:
    bench = Bench()
    bench.node()
    bench.model()
    request = bench.router.submit("m", (1,), params())
    bench.router.cancel(request.id)
    assert bench.router.model_counts("m") == (0, 0)
    assert bench.timers == 0
    bench.instance()
    assert bench.take(Submit) == []


def test_finished_requests_are_remembered_up_to_a_bound() -> None:
    bench = Bench(RouterSettings(remembered_requests=2))
    bench.warm()
    ids = []
    for _ in range(3):
        ids.append(bench.router.submit("m", (1,), params()).id)
        (submit,) = bench.take(Submit)
        bench.tokens(run(submit, 1), end(submit, 1, EndReason.STOP))
    assert [view.id for view in bench.router.requests()] == ids[1:]
    with pytest.raises(NotFound):
        bench.router.request(ids[0])


@pytest.mark.parametrize("cut", [False, True], ids=["short", "pages"])
def test_a_failed_request_is_remembered_with_why_it_failed(cut: bool) -> None:
    bench = Bench()
    bench.warm()
    fault = Fault("out_of_space", "no KV blocks" + " at all" * (100_000 if cut else 1))
    failed, well = (bench.router.submit("m", (1,), params()) for _ in range(2))
    first, second = bench.take(Submit)
    assert bench.router.request(failed.id).fault is None
    bench.tokens(end(first, 0, EndReason.ERROR, fault=fault), run(second, 1), end(second, 1))
    view = bench.router.request(failed.id)
    assert view.state is RequestState.FAILED
    assert view.fault is not None
    assert view.fault.code == fault.code
    if cut:
        assert fault.message.startswith(view.fault.message.removesuffix("…"))
        assert 1000 < len(view.fault.message) < 4000
    else:
        assert view.fault.message == fault.message
    assert bench.router.request(well.id).fault is None
    cancelled = bench.router.submit("m", (1,), params())
    cancelled.cancel()
    assert bench.router.request(cancelled.id).fault is None


def test_a_finished_request_still_says_where_it_ran_when_its_instance_is_gone() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    bench.tokens(run(submit, 2), end(submit, 1))
    bench.instance(state=InstanceState.STOPPED)
    view = bench.router.request(request.id)
    assert (view.state, view.instance, view.node) == (RequestState.FINISHED, "i", "n.example")


def test_journals_memory_is_given_back() -> None:
    bench = Bench(RouterSettings(max_journal_tokens=10))
    bench.warm()
    for _ in range(5):
        bench.router.submit("m", (1,) * 8, params())
        (submit,) = bench.take(Submit)
        bench.tokens(run(submit, 1, 2, 3), end(submit, 3, EndReason.STOP))


def test_log_probabilities_count_as_the_tokens_that_they_are_as_large_as() -> None:
    bench = Bench(RouterSettings(max_journal_tokens=10))
    bench.warm()
    bench.router.submit("m", (1,) * 2, params(logprobs=1))
    (submit,) = bench.take(Submit)
    record = struct.pack("<ifif", 7, -1.0, 7, -1.0)
    bench.tokens(TokenRun(submit.attempt, 0, (7, 7), record * 2))
    with pytest.raises(Overloaded, match="requests of 8 tokens"):
        bench.router.submit("m", (1,) * 3, params())
    bench.tokens(end(submit, 2, EndReason.STOP))
    bench.router.submit("m", (1,) * 10, params(1))


async def test_on_a_real_event_loop_a_waiting_request_times_out() -> None:
    posted: list[Event] = []
    router = Router(
        send=lambda node, message: None, post=posted.append, epochs=EpochCounter(1), ids=system_ids, settings=RouterSettings()
    )
    spec = ModelSpec(name="m", source=PathSource("/m"), cold_start_timeout_s=0.01)
    router.model_changed(ModelChanged("m", spec, ModelState.DEPLOYED, "d", 100))
    request = router.submit("m", (1,), params())
    assert isinstance(await failure_of(request), TimedOut)
    assert posted == [DemandChanged("m", 1, 0), DemandChanged("m", 0, 0)]


async def test_a_reader_of_the_whole_is_woken_by_the_end_alone() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params(3))
    (submit,) = bench.take(Submit)
    sequence = request.sequences[0]
    reader = asyncio.ensure_future(sequence.wait(3))
    await asyncio.sleep(0)
    bench.tokens(run(submit, 3, 4))
    bench.tokens(run(submit, 5, start=2))
    assert await asyncio.wait([reader], timeout=0.02) == (set(), {reader})
    bench.tokens(end(submit, 3))
    await asyncio.wait_for(reader, 60)


async def test_a_reader_that_gives_up_waiting_leaves_the_others_waiting() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params())
    (submit,) = bench.take(Submit)
    sequence = request.sequences[0]
    one, two = asyncio.ensure_future(sequence.wait(0)), asyncio.ensure_future(sequence.wait(0))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.wait([one])
    bench.tokens(run(submit, 3))
    await asyncio.wait_for(two, 60)


def test_models_of_one_cluster_do_not_share_instances() -> None:
    bench = Bench()
    bench.warm()
    bench.model("other")
    bench.router.submit("other", (1,), params())
    assert bench.take(Submit) == []
    assert [model.name for model in bench.router.models()] == ["m", "other"]
    assert bench.router.model_counts("other") == (1, 0)


def test_a_choice_of_which_no_more_is_wanted_ends_alone() -> None:
    bench = Bench()
    bench.warm()
    request = bench.router.submit("m", (1,), params(9), choices=2)
    first, second = bench.take(Submit)
    bench.tokens(run(first, 4, 5), run(second, 6))
    request.sequences[0].complete()
    request.sequences[0].complete()
    assert [cancel.attempt for cancel in bench.take(Cancel)] == [first.attempt]
    assert (request.sequences[0].finish, request.sequences[1].finish) == (EndReason.STOP, None)
    assert request.state == RequestState.RUNNING
    bench.tokens(run(first, 7, start=2), end(first, 3, EndReason.CANCELLED), run(second, 8, start=1), end(second, 2))
    assert (request.sequences[0].tokens, request.sequences[1].tokens) == ([4, 5], [6, 8])
    assert request.state == RequestState.FINISHED
    waiting = bench.router.submit("m", (1,), params(9))
    waiting.sequences[0].complete()
    assert (waiting.state, bench.router.live) == (RequestState.FINISHED, 0)

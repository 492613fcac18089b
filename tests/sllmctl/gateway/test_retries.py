"""Requests with an Idempotency-Key: retries join what runs or get what was made, also after the manager was restarted."""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from schema.errors import Overloaded, SllmError
from schema.ids import epoch_of, make_id
from schema.link import Acked, AttemptTruth, Cancel, Ended, EngineTiming, RetryKey, Submit, TokenRun
from schema.states import EndReason, RequestState
from sllmctl.gateway import story
from sllmctl.gateway.errors import KeyReused
from sllmctl.gateway.router import Request
from sllmctl.gateway.router_settings import RouterSettings
from tests.sllmctl.gateway.harness import END, WAIT_S, Serving, chat_body, http_post, ids_of, serving
from tests.sllmctl.gateway.routing import Bench, end, params, run

_CHAT = "/v1/chat/completions"
_KEY = RetryKey(key="k", body="b")
_NAME = make_id("req", 900.0, bytes(10))


def _bench(**settings: Any) -> Bench:
    bench = Bench(RouterSettings(**settings))
    bench.warm()
    return bench


def _begun(bench: Bench, key: RetryKey = _KEY) -> tuple[Request, list[Submit]]:
    assert bench.router.join(key) is None
    request = bench.router.submit("m", (1, 2), params(seed=5), key.choices, retry=key)
    return request, bench.take(Submit)


def _finish(bench: Bench, submit: Submit, *ids: int) -> None:
    bench.tokens(run(submit, *ids), end(submit, len(submit.generated) + len(ids)))


def _acked(bench: Bench) -> list[int]:
    return [epoch for message in bench.take(Acked) for epoch in message.ends]


def test_a_retry_joins_what_runs_and_another_body_does_not() -> None:
    bench = _bench()
    request, (submit,) = _begun(bench)
    assert submit.retry == _KEY
    assert bench.router.join(_KEY) is request
    with pytest.raises(KeyReused, match="use a new key"):
        bench.router.join(replace(_KEY, body="other"))
    request.leave()
    request.leave()
    bench.advance(29)
    assert bench.router.join(_KEY) is request
    bench.advance(100)
    assert request.state == RequestState.RUNNING
    assert bench.take(Cancel) == []


def test_what_its_reader_was_told_is_a_requests_fault_only_once_it_has_ended_so(caplog: pytest.LogCaptureFixture) -> None:
    bench = _bench()

    def told(request: Request) -> tuple[RequestState, str | None]:
        view = bench.router.request(request.id)
        return view.state, view.fault and view.fault.code

    request, _ = _begun(bench)
    request.leave(Overloaded("its tokenizer takes too long", 1.0))
    assert told(request) == (RequestState.RUNNING, None), "a retry may come for it"
    bench.router.cancel(request.id)
    assert told(request) == (RequestState.CANCELLED, None)
    request, (submit,) = _begun(bench)
    request.leave(Overloaded("its tokenizer takes too long", 1.0))
    caplog.set_level(logging.INFO, story.LOGGER)
    _finish(bench, submit, 5)
    assert told(request) == (RequestState.FAILED, "overloaded")
    (ended,) = [record for record in caplog.records if record.getMessage() == "ended"]
    assert (ended.about["outcome"], ended.about["code"]) == ("failed", "overloaded")  # type: ignore[attr-defined]


def test_without_a_retry_it_ends_after_the_grace_and_is_forgotten() -> None:
    bench = _bench(retry_grace_s=3.0)
    request, (submit,) = _begun(bench)
    request.leave()
    bench.advance(3)
    assert request.state == RequestState.CANCELLED
    assert bench.take(Cancel) == [Cancel(attempt=submit.attempt)]
    assert bench.router.join(_KEY) is None
    bench.tokens(end(submit, 0, EndReason.CANCELLED))
    assert _acked(bench) == [submit.attempt]


def test_a_client_that_leaves_takes_nothing_from_another_that_reads() -> None:
    bench = _bench(retry_grace_s=0.0)
    request, _ = _begun(bench)
    assert bench.router.join(_KEY) is request
    request.leave()
    assert request.state == RequestState.RUNNING
    request.leave()
    assert request.state == RequestState.CANCELLED


def test_a_reply_is_kept_for_a_while_and_its_end_is_acknowledged_only_then() -> None:
    bench = _bench(replies_kept_s=60.0)
    request, (submit,) = _begun(bench)
    _finish(bench, submit, 7, 8)
    request.leave()
    assert _acked(bench) == []
    # A broken link states the end again, which means nothing new.
    bench.router.link_lost("n")
    bench.node(attempts=(AttemptTruth(submit=submit, new_ids=(7, 8), end=end(submit, 2)),))
    assert _acked(bench) == []
    assert bench.router.join(_KEY) is request
    assert (request.sequences[0].tokens, request.sequences[0].finish) == ([7, 8], EndReason.LENGTH)
    bench.advance(60)
    assert _acked(bench) == [submit.attempt]
    assert bench.router.join(_KEY) is None
    assert bench.timers == 0


def test_replies_are_kept_within_bounds_the_oldest_leave_first() -> None:
    bench = _bench(replies_kept=2, replies_kept_tokens=9)
    keys = [RetryKey(key=f"k{number}", body="b") for number in range(4)]
    attempts = []
    for key in keys[:3]:
        _, (submit,) = _begun(bench, key)
        _finish(bench, submit, 7)
        attempts.append(submit.attempt)
    assert [bench.router.join(key) is not None for key in keys[:3]] == [False, True, True]
    assert _acked(bench) == attempts[:1]
    _, (submit,) = _begun(bench, keys[3])
    _finish(bench, submit, *range(5))
    assert [bench.router.join(key) is not None for key in keys] == [False, False, False, True]
    _, (submit,) = _begun(bench, keys[0])
    _finish(bench, submit, *range(9))
    assert bench.router.join(keys[0]) is None


def test_what_failed_or_was_cancelled_runs_anew() -> None:
    bench = _bench()
    request, (submit,) = _begun(bench)
    bench.tokens(end(submit, 0, EndReason.ERROR))
    assert isinstance(request.failure, SllmError)
    request, (submit,) = _begun(bench)
    bench.router.cancel(request.id)
    assert bench.router.join(_KEY) is None


def _old(counter: int, choice: int = 0, key: RetryKey = _KEY, **more: Any) -> Submit:
    return Submit(
        attempt=epoch_of(3, counter), instance="i", instance_epoch=epoch_of(1, 1), request=_NAME, model="m",
        choice=choice, prompt=(1, 2), params=params(seed=5, **more), retry=key,
    )  # fmt: skip


def test_a_restarted_manager_finds_what_runs_and_what_was_made() -> None:
    both = replace(_KEY, choices=2)
    bench = Bench()
    bench.model()
    ended, running = _old(1, 0, both), _old(2, 1, both)
    timing = EngineTiming(cached_tokens=1)
    made = AttemptTruth(submit=ended, new_ids=(7, 8), end=end(ended, 2, timing=timing))
    bench.node(attempts=(made, AttemptTruth(submit=running, new_ids=(9,))))
    bench.instance()
    assert _acked(bench) == []
    request = bench.router.join(both)
    assert request is not None
    assert (request.id, request.orphaned, request.params.seed, request.engine) == (_NAME, False, 5, timing)
    assert request.received_at == 900.0
    assert [(s.tokens, s.finish) for s in request.sequences] == [([7, 8], EndReason.LENGTH), ([9], None)]
    assert request.sequences[0].cached_tokens == 1
    bench.advance(100)
    bench.tokens(run(running, 10, start=1), end(running, 2))
    assert request.state == RequestState.FINISHED
    assert bench.router.join(both) is request
    bench.advance(1000)
    assert sorted(_acked(bench)) == [ended.attempt, running.attempt]
    assert bench.router.live == 0


def test_a_reply_that_a_stop_string_ended_is_kept_by_its_node_too() -> None:
    bench = _bench()
    request, (submit,) = _begun(bench)
    bench.tokens(run(submit, 7, 8))
    request.sequences[0].complete()
    stop = Cancel(attempt=submit.attempt, reason=EndReason.STOP)
    assert bench.take(Cancel) == [stop]
    # What a broken link may have swallowed is said again.
    bench.router.link_lost("n")
    bench.node(attempts=(AttemptTruth(submit=submit, new_ids=(7, 8, 9)),))
    assert bench.take(Cancel) == [stop]
    bench.tokens(end(submit, 3, EndReason.STOP))
    assert _acked(bench) == []
    bench.advance(1000)
    assert _acked(bench) == [submit.attempt]


def test_what_is_found_again_takes_no_other_requests_id() -> None:
    bench = Bench()
    bench.model()
    fresh = bench.router.submit("m", (1, 2), params(), request_id=_NAME)
    old = _old(1)
    bench.node(attempts=(AttemptTruth(submit=old, new_ids=(7,)),))
    bench.instance()
    (begun,) = bench.take(Submit)
    found = bench.router.join(_KEY)
    assert found is not None
    assert (fresh.id, found.id != fresh.id) == (_NAME, True)
    bench.tokens(run(old, 8, start=1), end(old, 2))
    bench.tokens(run(begun, 9), end(begun, 1))
    assert (found.state, fresh.state) == (RequestState.FINISHED, RequestState.FINISHED)
    assert (found.sequences[0].tokens, fresh.sequences[0].tokens) == ([7, 8], [9])


def test_choices_come_from_several_nodes_and_one_that_none_has_is_begun() -> None:
    three = replace(_KEY, choices=3)
    bench = Bench()
    bench.model()
    bench.node("n", (AttemptTruth(submit=_old(1, 0, three), new_ids=(7,)),))
    bench.node("o", (AttemptTruth(submit=_old(2, 1, three), new_ids=(8,)),))
    bench.instance()
    request = bench.router.join(three)
    assert request is not None
    assert [s.tokens for s in request.sequences] == [[7], [8], []]
    (begun,) = bench.take(Submit)
    assert (begun.choice, begun.params.seed, begun.request) == (2, 5, _NAME)
    # A node that comes later with that choice is too late.
    late = _old(3, 2, three)
    bench.node("p", (AttemptTruth(submit=late, new_ids=(9,)),))
    assert bench.take(Cancel) == [Cancel(attempt=late.attempt)]


def test_a_retry_that_comes_before_its_node_waits_for_it_and_gets_its_tokens() -> None:
    bench = Bench()
    bench.model()
    bench.instance()
    request = bench.router.submit("m", (1, 2), params(seed=77), retry=_KEY)
    assert request.state == RequestState.WAITING
    old = _old(1)
    bench.node(attempts=(AttemptTruth(submit=old, new_ids=(7, 8)),))
    assert bench.take(Submit) == []
    assert (request.sequences[0].tokens, request.params.seed, request.state) == ([7, 8], 5, RequestState.RUNNING)
    bench.advance(1000)
    bench.tokens(run(old, 9, start=2), end(old, 3))
    assert request.state == RequestState.FINISHED


@pytest.mark.parametrize("change", [{"body": "other"}, {"choices": 2}])
def test_what_another_request_holds_the_key_of_is_not_adopted(change: dict[str, Any]) -> None:
    bench = Bench()
    bench.model()
    request = bench.router.submit("m", (1, 2), params(), retry=replace(_KEY, **change))
    live, ended = _old(1), replace(_old(2), request="req_other")
    bench.node(attempts=(AttemptTruth(submit=live), AttemptTruth(submit=ended, end=end(ended, 0))))
    assert request.sequences[0].attempt is None
    sent = [message for _, message in bench.sent]
    assert Cancel(attempt=live.attempt) in sent
    assert Acked(frame=0, ends=(ended.attempt,)) in sent


def test_log_probabilities_come_back_with_a_reply_that_had_moved() -> None:
    bench = _bench()
    request = bench.router.submit("m", (1, 2), params(seed=5, logprobs=0), retry=_KEY)
    (first,) = bench.take(Submit)
    records = [struct.pack("<if", token, -token) for token in (7, 8)]
    bench.tokens(TokenRun(first.attempt, 0, (7,), records[0]), end(first, 1, EndReason.LOST))
    bench.instance(epoch=epoch_of(1, 2))
    (moved,) = bench.take(Submit)
    assert (moved.generated, moved.logprobs) == ((7,), records[0])
    bench = Bench()
    bench.model()
    moved = replace(moved, attempt=epoch_of(3, 1))
    bench.node(attempts=(AttemptTruth(submit=moved, new_ids=(8,), logprobs=records[1]),))
    again = bench.router.join(_KEY)
    assert again is not None
    assert again.id == request.id
    assert (again.sequences[0].tokens, bytes(again.sequences[0].logprobs)) == ([7, 8], b"".join(records))


# --- over HTTP


async def _submitted(bench: Bench, here: Serving) -> list[Submit]:
    async with asyncio.timeout(WAIT_S):
        while not (found := bench.take(Submit)):
            await here.client.get("/healthz")
    return found


def _post(here: Serving, key: str = "a-key", **more: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(here.client.post(_CHAT, json=chat_body(model="m", **more), headers={"Idempotency-Key": key}))


async def test_a_client_that_goes_away_mid_stream_gets_all_of_it_again() -> None:
    bench = _bench()
    async with serving(router=bench.router) as here:
        reader, writer = await here.raw()
        body = chat_body(model="m", stream=True, n=2)
        writer.write(http_post(_CHAT, body, "Idempotency-Key: a-key"))
        first, second = await _submitted(bench, here)
        bench.tokens(TokenRun(first.attempt, 0, tuple(ids_of("before "))))
        await asyncio.wait_for(reader.readuntil(b"before "), WAIT_S)
        writer.close()
        async with asyncio.timeout(WAIT_S):
            while here.metric("sllm_live_requests"):
                await here.client.get("/healthz")
        retries = [_post(here, stream=True, n=2) for _ in range(2)]
        async with asyncio.timeout(WAIT_S):
            while here.metric("sllm_live_requests") < 2:
                await here.client.get("/healthz")
        rest = (*ids_of("after"), END)
        bench.tokens(
            TokenRun(first.attempt, 7, rest),
            Ended(attempt=first.attempt, position=7 + len(rest), reason=EndReason.STOP),
            TokenRun(second.attempt, 0, (END,)),
            Ended(attempt=second.attempt, position=1, reason=EndReason.STOP),
        )
        answers = [await retry for retry in retries]
        third = await _post(here, stream=True, n=2)
        for answer in (*answers, third):
            assert answer.headers["idempotent-replayed"] == "true"
            assert answer.text.count('"finish_reason":"stop"') == 2
            assert answer.text.endswith("data: [DONE]\n\n")
            spoken = [part.partition('"}')[0] for part in answer.text.split('"delta":{"content":"')[1:]]
            assert "".join(spoken) == "before after"
        assert not bench.take(Submit)
        refused = await _post(here, stream=True, n=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert here.metric("sllm_prompt_tokens_total", model="m") == len(first.prompt)


async def test_of_two_that_come_at_once_one_is_run() -> None:
    bench = _bench()
    async with serving(router=bench.router) as here:
        both = [_post(here), _post(here)]
        async with asyncio.timeout(WAIT_S):
            while here.metric("sllm_live_requests") < 2:
                await here.client.get("/healthz")
        (submit,) = await _submitted(bench, here)
        bench.tokens(TokenRun(submit.attempt, 0, (*ids_of("yes"), END)), end(submit, 4, EndReason.STOP))
        one, other = [await answer for answer in both]
        assert one.json() == other.json()
        assert {"idempotent-replayed" in answer.headers for answer in (one, other)} == {True, False}
    assert not bench.take(Submit)


async def test_a_stop_string_ends_it_for_every_retry_alike() -> None:
    bench = _bench()
    async with serving(router=bench.router) as here:
        waiting = _post(here, stop="END")
        (submit,) = await _submitted(bench, here)
        said = tuple(ids_of("so far END and more"))
        bench.tokens(TokenRun(submit.attempt, 0, said))
        answer = (await waiting).json()
        assert answer["choices"][0]["message"]["content"] == "so far "
        # What the engine says of it comes after the answer, and is in no retry's either.
        bench.tokens(end(submit, len(said), EndReason.STOP, timing=EngineTiming(cached_tokens=1)))
        assert (await _post(here, stop="END")).json() == answer


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    bench = _bench()
    async with serving(router=bench.router) as here:
        answer = await _post(here, key)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert bench.router.live == 0


async def test_two_keys_are_refused() -> None:
    bench = _bench()
    async with serving(router=bench.router) as here:
        reader, writer = await here.raw()
        writer.write(http_post(_CHAT, chat_body(model="m"), "Idempotency-Key: a", "Idempotency-Key: b"))
        assert b" 400 " in await asyncio.wait_for(reader.readline(), WAIT_S)
        writer.close()
    assert bench.router.live == 0

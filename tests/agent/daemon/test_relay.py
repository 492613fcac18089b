"""Attempts between manager and worker: nothing lost, nothing twice, kept until acknowledged, within the window."""

from __future__ import annotations

import random
import struct

import msgspec
import pytest

from agent.daemon.attempts import Attempt, Journal
from schema.errors import LinkError
from schema.ids import Epoch, epoch_of
from schema.link import (
    TOKEN_WINDOW_FRAMES,
    Acked,
    Cancel,
    Ended,
    InstanceLoad,
    InstanceUpdate,
    Ping,
    Pong,
    Submit,
    TokenRun,
    Tokens,
)
from schema.states import EndReason, InstanceState
from tests.agent.daemon.peers import Manager, Node, Worker, start_instance, submit

A = epoch_of(1, 9)


async def running(node: Node, **fields: object) -> tuple[Manager, Worker]:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    manager.send(submit(A, start, **fields))
    await worker.hear(Submit)
    return manager, worker


async def test_tokens_and_the_end_travel_and_the_worker_is_acked_after_the_manager(node: Node) -> None:
    manager, worker = await running(node, generated=(10, 11))
    worker.say(A, (12,))
    worker.say(A, (13, 14), EndReason.LENGTH)
    ids, end = await manager.tokens_until_end(A, ack=False)
    assert ids == [12, 13, 14]
    assert (end.position, end.reason) == (5, EndReason.LENGTH)
    manager.send(Ping(nonce=1))
    await manager.take(Pong)
    assert A in worker.submits
    manager.send(Acked(frame=1, ends=(A,)))
    assert (await worker.hear(Acked)).ends == (A,)


async def test_a_known_attempt_is_not_submitted_twice(node: Node) -> None:
    manager, worker = await running(node)
    manager.send(submit(A, start_instance()))
    manager.send(submit(epoch_of(1, 10), start_instance()))
    assert (await worker.hear(Submit)).attempt == epoch_of(1, 10)


async def test_an_end_is_repeated_in_each_truth_until_it_is_acked(node: Node) -> None:
    manager, worker = await running(node)
    worker.say(A, (1, 2), EndReason.STOP)
    await manager.tokens_until_end(A, ack=False)
    for _ in range(2):
        manager = await node.manager()
        (attempt,) = manager.attempts
        assert attempt.submit.attempt == A
        assert attempt.new_ids == (1, 2)
        assert attempt.end is not None
    manager.send(Acked(frame=0, ends=(A,)))
    await worker.hear(Acked)
    assert (await node.manager()).attempts == []


async def test_tokens_made_without_a_manager_are_in_the_next_truth_and_go_on_from_there(node: Node) -> None:
    manager, worker = await running(node)
    worker.say(A, (1,))
    await manager.take(Tokens)
    manager.close()
    node.managers.remove(manager)
    worker.say(A, (2, 3))
    again = await node.manager()
    known = len(again.attempts[0].new_ids)
    worker.say(A, (4,), EndReason.STOP)
    ids, end = await again.tokens_until_end(A)
    assert [*again.attempts[0].new_ids, *ids] == [1, 2, 3, 4]
    assert known + len(ids) == end.position


async def test_the_next_manager_is_told_how_busy_instances_are_and_not_of_those_that_are_gone(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    load = InstanceLoad(instance=start.instance, epoch=start.epoch, running=2, waiting=1, kv_used_tokens=7)
    worker.peer.send(load)
    assert await manager.take(InstanceLoad) == load
    manager = await node.manager()
    assert await manager.take(InstanceLoad) == load
    worker.kill()
    await manager.take(InstanceUpdate, lambda told: told.truth.state is InstanceState.STOPPED)
    manager = await node.manager()
    manager.send(Ping(nonce=1))
    await manager.take(Pong)
    assert not [told for told in manager.seen if isinstance(told, InstanceLoad)]


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.STOP])
async def test_a_cancel_reaches_the_worker_and_its_end_comes_back(node: Node, reason: EndReason) -> None:
    manager, _ = await running(node)
    manager.send(Cancel(attempt=A, reason=reason))
    assert (await manager.tokens_until_end(A))[1].reason is reason
    manager.send(Cancel(attempt=epoch_of(1, 77)))
    manager.send(Ping(nonce=5))
    await manager.take(Pong)


async def test_a_submit_to_what_is_not_ready_is_lost(node: Node) -> None:
    manager = await node.manager()
    manager.send(submit(A, start_instance("inst_x"), generated=(5, 6)))
    _, end = await manager.tokens_until_end(A)
    assert (end.reason, end.position) == (EndReason.LOST, 2)


async def test_an_attempt_that_the_workers_next_truth_lacks_is_handed_over_again_from_where_it_stands(node: Node) -> None:
    manager, worker = await running(node)
    given = worker.submits[A]
    worker.say(A, (1, 2))
    await manager.take(Tokens)
    worker.submits.clear()
    await worker.redial()
    again = await worker.hear(Submit)
    assert again == msgspec.structs.replace(given, generated=(*given.generated, 1, 2))
    worker.say(A, (3,), EndReason.STOP)
    ids, end = await manager.tokens_until_end(A)
    assert (ids, end.reason, end.position) == ([3], EndReason.STOP, len(given.generated) + 3)


async def test_an_attempt_that_breaks_its_workers_link_again_and_again_is_given_up(node: Node) -> None:
    manager, worker = await running(node)
    for _ in range(3):
        worker.submits.clear()
        await worker.redial()
        await worker.hear(Submit)
    worker.submits.clear()
    await worker.redial()
    _, end = await manager.tokens_until_end(A)
    assert end.reason is EndReason.ERROR
    assert end.fault is not None
    assert "4 times" in end.fault.message


@pytest.mark.parametrize("reason", [EndReason.CANCELLED, EndReason.STOP])
async def test_a_cancelled_attempt_that_the_workers_next_truth_lacks_is_over(node: Node, reason: EndReason) -> None:
    manager, worker = await running(node)
    await worker.hang_up()
    manager.send(Cancel(attempt=A, reason=reason))
    manager.send(Ping(nonce=1))
    await manager.take(Pong)
    worker.submits.clear()
    worker.begin()
    assert (await manager.tokens_until_end(A))[1].reason is reason


async def test_an_attempt_submitted_while_the_workers_link_is_down_is_handed_over_later(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    await worker.hang_up()
    manager.send(submit(A, start))
    manager.send(Ping(nonce=1))
    await manager.take(Pong)
    worker.begin()
    assert (await worker.hear(Submit)).attempt == A


async def test_what_the_worker_still_holds_of_a_forgotten_attempt_is_acked_again(node: Node) -> None:
    manager, worker = await running(node)
    kept = worker.submits[A]
    worker.say(A, (1,), EndReason.STOP)
    end = worker.ends[A]
    await manager.tokens_until_end(A)
    await worker.hear(Acked)
    worker.submits[A], worker.ends[A] = kept, end
    await worker.redial()
    assert (await worker.hear(Acked)).ends == (A,)


async def test_an_unknown_live_attempt_of_a_worker_is_cancelled_once_truth_was_told(node: Node) -> None:
    manager = await node.manager()
    start, worker = await node.ready(manager)
    worker.submits[A] = submit(A, start)
    worker.generated[A] = [1, 2]
    await worker.redial()
    assert (await worker.hear(Cancel)).attempt == A
    assert (await worker.hear(Acked)).ends == (A,)


async def test_frames_stop_at_the_window_and_coalesce(node: Node) -> None:
    manager, worker = await running(node)
    frames = []
    for token in range(TOKEN_WINDOW_FRAMES):
        worker.say(A, (token,))
        frames.append(await manager.take(Tokens))
    for token in range(50):
        worker.say(A, (1000 + token,))
    manager.send(Ping(nonce=1))
    assert isinstance(await manager.next(), Pong)
    worker.say(A, (), EndReason.STOP)
    await node.until(lambda: node.agent is not None and not node.agent._journal.busy(submit_life()))
    manager.send(Acked(frame=1))
    frame = await manager.take(Tokens)
    assert frame.frame == TOKEN_WINDOW_FRAMES + 1
    assert frame.runs == (TokenRun(A, TOKEN_WINDOW_FRAMES, tuple(range(1000, 1050))),)
    assert len(frame.ends) == 1


def submit_life() -> tuple[str, Epoch]:
    start = start_instance()
    return start.instance, start.epoch


async def test_an_ack_of_frames_that_were_not_sent_ends_the_connection(node: Node) -> None:
    manager = await node.manager()
    manager.send(Acked(frame=5))
    await manager.hangup()


def records(ids: tuple[int, ...]) -> bytes:
    """A log-probability for each token, and that of another."""
    return b"".join(struct.pack("<ifif", token, -token / 8, token + 1, -token / 4) for token in ids)


def test_appending_is_idempotent_and_a_gap_is_an_error() -> None:
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    whole = tuple(range(100, 160))
    attempt = Attempt(submit(A, start_instance(), generated=tuple(range(10))))
    sequence = (*range(10), *whole)
    known = 10
    sent: list[int] = []
    while known < len(sequence):
        start = draw.randrange(known + 1)
        stop = draw.randrange(start, len(sequence)) + 1
        attempt.append(TokenRun(A, start, sequence[start:stop], records(sequence[start:stop])))
        known = max(known, stop)
        assert attempt.position == known, f"seed {seed}"
        if draw.random() < 0.5 and (run := attempt.unsent(draw.randrange(1, 9))) is not None:
            assert run.start == 10 + len(sent)
            assert run.logprobs == records(run.ids)
            sent.extend(run.ids)
    while (run := attempt.unsent(1000)) is not None:
        sent.extend(run.ids)
    assert tuple(sent) == whole
    with pytest.raises(LinkError, match="gap"):
        attempt.append(TokenRun(A, known + 1, (1,)))


def test_an_end_beyond_the_known_tokens_is_an_error_and_the_first_end_counts() -> None:
    journal = Journal()
    journal.add(submit(A, start_instance()))
    with pytest.raises(LinkError, match="gap"):
        journal.end(Ended(attempt=A, position=3, reason=EndReason.STOP))
    journal.end(Ended(attempt=A, position=0, reason=EndReason.STOP))
    journal.end(Ended(attempt=A, position=0, reason=EndReason.ERROR))
    assert [end.reason for end in journal.take_fresh()[1]] == [EndReason.STOP]
    assert not journal.has_fresh
    journal.append(TokenRun(A, 0, (1,)))
    assert journal.acked((A, epoch_of(3, 3))) == {submit_life(): [A]}
    assert len(journal) == 0

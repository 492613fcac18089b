"""What a worker must be able to say again, by itself."""

from __future__ import annotations

import struct

import pytest

from agent.engine.api import StepOutput
from agent.workers import journal as module
from agent.workers.journal import Journal
from schema.ids import Epoch
from schema.link import Ended, TokenRun
from schema.sampling import read_logprobs
from schema.states import EndReason
from tests.agent.engine.models import submit_of


def _told(*tokens: int) -> bytes:
    return b"".join(struct.pack("<ifif", token, -token, 9, -9.0) for token in tokens)


def _step(*runs: TokenRun, ends: tuple[Ended, ...] = ()) -> StepOutput:
    return StepOutput(list(runs), list(ends))


def test_log_probabilities_are_told_once_and_again_in_a_truth() -> None:
    journal = Journal()
    journal.add(submit_of(1, [5], 9, [6, 7], logprobs=1))
    journal.take(_step(TokenRun(Epoch(1), 2, (10,), _told(10))))
    assert journal.frame().runs == (TokenRun(Epoch(1), 2, (10,), _told(10)),)
    journal.take(_step(TokenRun(Epoch(1), 3, (11,), _told(11))))
    journal.take(_step(TokenRun(Epoch(1), 4, (12,), _told(12))))
    assert journal.frame().runs == (TokenRun(Epoch(1), 3, (11, 12), _told(11, 12)),)
    (truth,) = journal.truth()
    assert truth.run == TokenRun(Epoch(1), 2, (10, 11, 12), _told(10, 11, 12))
    assert [each.token for each in read_logprobs(truth.run.since(3).logprobs, 2)] == [11, 12]
    assert not journal.fresh


def test_what_does_not_fit_a_frame_stays_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FRAME_BYTES", 100)
    journal = Journal()
    for attempt in range(1, 7):
        journal.add(submit_of(attempt, [5], 9, logprobs=1))
        journal.take(
            _step(
                TokenRun(Epoch(attempt), 0, (1, 2), _told(1, 2)),
                ends=(Ended(attempt=Epoch(attempt), position=2, reason=EndReason.LENGTH),),
            )
        )
    frames = []
    while journal.fresh:
        frames.append(journal.frame())
    assert [frame.frame for frame in frames] == [1, 2]
    assert [run.attempt for frame in frames for run in frame.runs] == [1, 2, 3, 4, 5, 6]
    assert all([run.attempt for run in frame.runs] == [end.attempt for end in frame.ends] for frame in frames)

"""A manager, played in the test."""

from __future__ import annotations

from schema.ids import Epoch
from schema.link import (
    Acked,
    AgentMessage,
    AttemptTruth,
    Ended,
    InstanceTruth,
    InstanceUpdate,
    NodeTruth,
    Tokens,
    TruthEnd,
)
from schema.states import InstanceState
from tests.agent.daemon.peers.base import WAIT_S, Peer


class Manager(Peer):
    """A manager's connection."""

    def __init__(self) -> None:
        super().__init__(AgentMessage)
        self.truth: NodeTruth
        self.attempts: list[AttemptTruth] = []

    async def instance(self, state: InstanceState, epoch: Epoch | None = None) -> InstanceTruth:
        update = await self.take(
            InstanceUpdate, lambda m: m.truth.state is state and (epoch is None or m.truth.epoch == epoch), WAIT_S
        )
        return update.truth

    async def instance_update(self, timeout_s: float = WAIT_S) -> InstanceTruth:
        return (await self.take(InstanceUpdate, timeout_s=timeout_s)).truth

    async def whole_truth(self) -> NodeTruth:
        self.truth = await self.take(NodeTruth)
        while not isinstance(message := await self.next(), TruthEnd):
            assert isinstance(message, AttemptTruth)
            self.attempts.append(message)
        assert message.attempts == len(self.attempts)
        return self.truth

    async def tokens_until_end(self, attempt: Epoch, *, ack: bool = True) -> tuple[list[int], Ended]:
        ids: list[int] = []
        while True:
            frame = await self.take(Tokens)
            for run in frame.runs:
                if run.attempt == attempt:
                    ids.extend(run.ids)
            ends = [end for end in frame.ends if end.attempt == attempt]
            if ack:
                self.send(Acked(frame=frame.frame, ends=tuple(end.attempt for end in ends)))
            if ends:
                return ids, ends[0]

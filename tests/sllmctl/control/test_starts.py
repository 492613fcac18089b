"""Starts and failures are told once each, whatever else changes of their rows."""

from __future__ import annotations

from schema.errors import Fault
from schema.ids import Epoch, epoch_of
from schema.link import InstanceTruth, StartPhases
from schema.states import InstanceState, Tier
from sllmctl.cluster.changes import PutInstance
from sllmctl.cluster.view import ClusterView
from sllmctl.control.starts import StartMeter


class Heard:
    def __init__(self) -> None:
        self.said: list[object] = []

    def started(self, model: str, target: Tier, phases: StartPhases) -> None:
        self.said.append((model, target, phases.total_s))

    def faulted(self, code: str) -> None:
        self.said.append(code)


def row(state: InstanceState, epoch: Epoch, *, fault: Fault | None = None) -> PutInstance:
    phases = StartPhases(total_s=2.0) if state is not InstanceState.STARTING else None
    truth = InstanceTruth(instance="i", epoch=epoch, digest="d", state=state, phases=phases, fault=fault)
    return PutInstance(truth, "m", "n", 0, 0, None, "", 0.0, 0.0)


def test_a_life_is_told_of_once_and_those_of_earlier_managers_never() -> None:
    heard = Heard()
    meter = StartMeter(ClusterView(), 2, heard)
    first, second, older = epoch_of(2, 1), epoch_of(2, 2), epoch_of(1, 9)
    meter.committed([row(InstanceState.READY, older)])
    meter.committed([row(InstanceState.STARTING, first), row(InstanceState.READY, first)])
    meter.committed([row(InstanceState.READY, first)])
    meter.committed([row(InstanceState.BACKOFF, first, fault=Fault("internal", "died"))])
    meter.committed([row(InstanceState.BACKOFF, first, fault=Fault("internal", "died"))])
    meter.committed([row(InstanceState.READY, second)])
    assert heard.said == [("m", Tier.DRAM, 2.0), "internal", ("m", Tier.DRAM, 2.0)]

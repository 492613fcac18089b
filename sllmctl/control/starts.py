"""Starts and failures of instances, told once each as their rows become durable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from schema.ids import Epoch, generation_of
from schema.link import StartPhases
from schema.states import InstanceState, Tier
from sllmctl.cluster.changes import PutInstance, RowChange
from sllmctl.cluster.view import ClusterView

__all__ = ["StartMeter", "StartsPort"]

_FAILED = frozenset({InstanceState.BACKOFF, InstanceState.FAILED})


class StartsPort(Protocol):
    """Who counts."""

    def started(self, model: str, target: Tier, phases: StartPhases) -> None:
        """An instance became ready, its weights on ``target``."""

    def faulted(self, code: str) -> None:
        """A life of an instance ended with this fault."""


class StartMeter:
    """Sees rows by `committed`. Lives that an earlier manager began are not told of: it counted them, or nobody did."""

    def __init__(self, view: ClusterView, generation: int, port: StartsPort) -> None:
        self._view = view
        self._generation = generation
        self._port = port
        self._told: dict[str, tuple[Epoch, bool]] = {}

    def committed(self, changes: Sequence[RowChange]) -> None:
        for change in changes:
            if isinstance(change, PutInstance):
                self._instance(change)
        if len(self._told) > 2 * len(self._view.instances) + 16:
            self._told = {name: told for name, told in self._told.items() if name in self._view.instances}

    def _instance(self, row: PutInstance) -> None:
        truth = row.truth
        if generation_of(truth.epoch) < self._generation:
            return
        ready = truth.state is InstanceState.READY and truth.phases is not None
        faulted = truth.state in _FAILED and truth.fault is not None
        if not (ready or faulted) or self._told.get(truth.instance) == (truth.epoch, faulted):
            return
        self._told[truth.instance] = (truth.epoch, faulted)
        if faulted:
            assert truth.fault is not None
            self._port.faulted(truth.fault.code)
        else:
            assert truth.phases is not None
            self._port.started(row.model, self._target(row), truth.phases)

    def _target(self, row: PutInstance) -> Tier:
        node = self._view.nodes.get(row.node)
        devices = node.inventory.devices if node is not None and node.inventory is not None else ()
        cuda = any(device.kind == "cuda" and device.index in row.truth.devices for device in devices)
        return Tier.DEVICE if cuda else Tier.DRAM

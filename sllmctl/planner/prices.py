"""What others pay, in seconds, when weights or instances of theirs go.

Whoever loses weights or an instance pays the reload, times the probability that it is called again within ``heat_s``: calls
come at ``heat / heat_s`` per second, so that is ``1 - exp(-heat)``. It is shared among its copies, since any of them may be the
one that is called. An instance that drains is in use: its probability is 1.
"""

from __future__ import annotations

from math import exp

from schema.states import ModelState, Tier
from sllmctl.cluster.records import Instance, Node
from sllmctl.cluster.settings import ControlSettings
from sllmctl.cluster.view import ClusterView
from sllmctl.planner.estimates import Channel, Estimates

__all__ = ["Prices"]


class Prices:
    """What losing something costs, as of one plan; probabilities are worked out once for each model. ``least_s``: ending a busy
    instance that is its model's only one costs no less."""

    def __init__(self, view: ClusterView, estimates: Estimates, settings: ControlSettings, now: float) -> None:
        self._view = view
        self._estimates = estimates
        self._settings = settings
        self._now = now
        self._called: dict[str, float] = {}
        self._node: Node | None = None
        self._disk_bps = self._device_bps = 0.0
        self.least_s = settings.start_base_s

    def called(self, digest: str) -> float:
        """How probable it is that a checkpoint is called again: by the recent calls of the deployed models that use it."""
        found = self._called.get(digest)
        if found is None:
            heat = 0.0
            for name in self._view.models_of(digest):
                model = self._view.models[name]
                if model.heat and model.state is ModelState.DEPLOYED:
                    heat += model.heat * exp(-max(0.0, self._now - model.heat_at) / self._settings.heat_s)
            found = self._called[digest] = 1.0 - exp(-heat) if heat > 0.0 else 0.0
        return found

    def load_s(self, node: Node, digest: str, part_bytes: int) -> float:
        """Bringing a checkpoint's part back to one device of a node."""
        view, name = self._view, node.id
        if self._node is not node:
            estimates = self._estimates
            self._node = node
            self._disk_bps = estimates.bandwidth_bps(node, Channel.DISK)
            self._device_bps = estimates.bandwidth_bps(node, Channel.DEVICE)
        seconds = part_bytes / self._device_bps
        if name in view.nodes_with(digest, Tier.DRAM):
            return seconds
        checkpoint = view.checkpoints.get(digest)
        return max(seconds, (part_bytes if checkpoint is None else checkpoint.image_bytes) / self._disk_bps)

    def weights_s(self, node: Node, digest: str, part_bytes: int, *, busy: bool = False) -> float:
        """Dropping a checkpoint's weights, so many bytes on each, from a node's devices."""
        called = 1.0 if busy else self.called(digest)
        if called <= 0.0:
            return 0.0
        return called * self.load_s(node, digest, part_bytes) / (len(self._view.nodes_with(digest, Tier.DEVICE)) or 1)

    def instance_s(self, instance: Instance, *, busy: bool) -> float:
        """Ending an instance, its weights left where they are."""
        called = 1.0 if busy else self.called(instance.digest)
        return called * self._settings.start_base_s / max(1, len(self._view.instances_of(instance.model)))

"""A simulated node's memory: checkpoints in DRAM, weights and KV caches on devices, never more than there is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from schema.states import Tier
from sllmctl.simulate.channels import Channel
from sllmctl.simulate.engine import Compute
from sllmctl.simulate.kernel import Kernel

__all__ = ["Arena", "Device", "Resident", "Weights"]


class Resident:
    """A checkpoint in DRAM. Loads and, on a CPU, instances use it; it is ``whole`` from ``whole_at`` on, read from ``source``
    (the tier, and whether it was another node's)."""

    __slots__ = ("size", "source", "users", "whole", "whole_at")

    def __init__(self, size: int, source: tuple[Tier, bool], whole_at: float) -> None:
        self.size = size
        self.users = 0
        self.whole = False
        self.whole_at = whole_at
        self.source = source


class Arena:
    """The DRAM tier. The least recently used goes first, and nothing that has users goes, as in agent.store.cache."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.residents: OrderedDict[str, Resident] = OrderedDict()

    def use(self, digest: str, change: int) -> None:
        resident = self.residents[digest]
        resident.users += change
        assert resident.users >= 0, f"checkpoint {digest} is let go once too often"
        self.residents.move_to_end(digest)

    def make_room(self, size: int) -> list[str] | None:
        """Evict what it takes for ``size`` bytes more and say which; None, and nothing evicted, when it cannot be had."""
        victims: list[str] = []
        free = self.budget_bytes - self.used_bytes
        for digest, resident in self.residents.items():
            if free >= size:
                break
            if not resident.users:
                victims.append(digest)
                free += resident.size
        if free < size:
            return None
        for digest in victims:
            self.drop(digest)
        return victims

    def put(self, digest: str, resident: Resident) -> None:
        self.residents[digest] = resident
        self.used_bytes += resident.size
        assert self.used_bytes <= self.budget_bytes, f"the arena holds {self.used_bytes} of {self.budget_bytes} bytes"

    def drop(self, digest: str) -> None:
        self.used_bytes -= self.residents.pop(digest).size


class Weights:
    """One device's part of a checkpoint. ``users`` are lives; it is ``whole`` from ``whole_at`` on."""

    __slots__ = ("size", "users", "whole", "whole_at")

    def __init__(self, size: int, whole_at: float) -> None:
        self.size = size
        self.users = 0
        self.whole = False
        self.whole_at = whole_at


class Device:
    """``weights`` by digest and by which part of it, since instances over several devices split it. ``held_s`` adds up the
    time in which instances have it."""

    __slots__ = (
        "_held_since",
        "_kernel",
        "_lives",
        "compute",
        "held_s",
        "index",
        "link",
        "memory_bytes",
        "used_bytes",
        "weights",
    )

    def __init__(self, kernel: Kernel, index: int, memory_bytes: int, link_bps: float) -> None:
        self.index = index
        self.memory_bytes = memory_bytes
        self.link = Channel(link_bps)
        self.compute = Compute(kernel)
        self.weights: dict[tuple[str, int], Weights] = {}
        self.held_s = 0.0
        self._kernel = kernel
        self.used_bytes = 0
        self._lives = 0
        self._held_since = 0.0

    def hold(self, kv_bytes: int) -> None:
        """A life begins here."""
        if not self._lives:
            self._held_since = self._kernel.now
        self._lives += 1
        self.take(kv_bytes)

    def release(self, kv_bytes: int) -> None:
        """A life has ended here."""
        self._lives -= 1
        if not self._lives:
            self.held_s += self._kernel.now - self._held_since
        self.take(-kv_bytes)

    def settle(self) -> None:
        """Count the time of what is here still."""
        if self._lives:
            self.held_s += self._kernel.now - self._held_since
            self._held_since = self._kernel.now

    def take(self, size: int) -> None:
        self.used_bytes += size
        assert self.used_bytes <= self.memory_bytes, f"a device of {self.memory_bytes} bytes holds {self.used_bytes}"

    def put(self, digest: str, part: int, weights: Weights) -> None:
        self.weights[digest, part] = weights
        self.take(weights.size)

    def drop(self, digest: str, part: int) -> None:
        self.take(-self.weights.pop((digest, part)).size)

    def parts_of(self, digest: str) -> Iterator[tuple[int, Weights]]:
        """What lies here of a checkpoint."""
        return ((part, weights) for (name, part), weights in list(self.weights.items()) if name == digest)

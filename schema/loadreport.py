"""What `sllmctl bench load` has measured of a checkpoint on a machine: the node's side's answer to the command line."""

from __future__ import annotations

import msgspec

from schema.errors import Fault

__all__ = ["LoadAnswer", "LoadReport", "LoadRow"]


class LoadRow(msgspec.Struct, frozen=True):
    """One way of bytes: medians over the rounds. ``of_limit`` is the median of rate over the same round's raw rate of the disk.

    ``low`` and ``high`` are the smallest and the largest of the seconds. Where no bytes are moved, ``rate_bps`` is 0 and
    ``cpu_s_per_gb`` None.
    """

    step: str
    seconds: float
    low: float
    high: float
    rate_bps: float
    of_limit: float | None = None
    cpu_s_per_gb: float | None = None


class LoadReport(msgspec.Struct, frozen=True):
    """The rows, and what bounds a start. ``bound`` is "disk", "memory" or "attach", or "size" of a model that is too small to
    tell; ``verdict`` says it in a sentence.

    ``cold`` is False where the file system would not let its pages go: then no row is of the disk. ``reader`` is how the store
    reads here, ``pages`` of which kind its memory is.
    """

    digest: str
    directory: str
    image_bytes: int
    tensors: int
    rounds: int
    reader: str
    pages: str
    cold: bool
    rows: tuple[LoadRow, ...]
    bound: str
    verdict: str


class LoadAnswer(msgspec.Struct, frozen=True):
    """Either a report or why there is none."""

    report: LoadReport | None = None
    fault: Fault | None = None

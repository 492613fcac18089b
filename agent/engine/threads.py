"""How many threads compute a model on a CPU, where nobody says it.

A worker's threads sleep between parallel regions, so that workers do not slow each other, and to wake one takes from tens of
microseconds to some tenths of a millisecond. A small model's products are over before that: two threads took two to seven
times as long as one for a model of 1 MiB, and the same for one of 70 to 200 MiB (bench.engine's tiny Llama, and layers of
growing width, on two cores of an AMD EPYC).
"""

from __future__ import annotations

from typing import Final

__all__ = ["threads_for"]

_BYTES_A_THREAD: Final = 64 << 20


def threads_for(image_bytes: int, cores: int) -> int:
    """One for every 64 MiB of weights, at least one, and no more than there are ``cores``."""
    return max(1, min(cores, image_bytes // _BYTES_A_THREAD))

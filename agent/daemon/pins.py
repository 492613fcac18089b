"""What the manager keeps on this node's tiers, remembered in the data directory, so that it holds without a manager too."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from agent.daemon.files import write_atomic
from schema.link import PinTo
from schema.states import Tier

__all__ = ["Pins"]

_log = logging.getLogger(__name__)


class Pins:
    """The latest that a manager said, in ``path``; a file that cannot be read is none, until the manager says it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pins: frozenset[PinTo] = frozenset()

    def load(self) -> None:
        """Read what an earlier life of the agent was told."""
        try:
            self._pins = frozenset(msgspec.json.decode(self._path.read_bytes(), type=tuple[PinTo, ...]))
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("cannot read %s: %s", self._path, error)

    def set(self, pins: tuple[PinTo, ...]) -> None:
        """Take in all that is kept from now on. `save` makes it last."""
        self._pins = frozenset(pins)

    def save(self) -> None:
        """Write it down. Raises OSError."""
        pins = sorted(self._pins, key=lambda pin: (pin.digest, pin.tier))
        write_atomic(self._path, msgspec.json.encode(pins))

    def tiers(self, digest: str) -> frozenset[Tier]:
        """On which tiers a checkpoint is kept."""
        return frozenset(pin.tier for pin in self._pins if pin.digest == digest)

    def on(self, tier: Tier) -> tuple[str, ...]:
        """What is kept on a tier, in order."""
        return tuple(sorted(pin.digest for pin in self._pins if pin.tier is tier))

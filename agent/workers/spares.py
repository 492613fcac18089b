"""Children of the zygote that hold a device's context already and wait to become workers.

To make a context takes CUDA tenths of a second, and must not be done before a fork; so it is done after one, by children that
nobody has asked for yet. One waits for each device. It is told by its pipe which instance it becomes, and ends with it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from schema.link import Fork

__all__ = ["Spares", "open_context", "wait_as_spare"]

_AFTER_FORK_S: Final = 2.0
"""A start has the machine for itself for so long before the next spare is made."""
_AFTER_LOSS_S: Final = 60.0
"""Where a spare ended without having been used, no context can be had just now."""
_FORK_BYTES: Final = 1 << 16
_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Fork)


@dataclass(frozen=True, slots=True)
class _Spare:
    pid: int
    line: socket.socket


class Spares:
    """The zygote's side. ``launch`` forks a child that calls `wait_as_spare` with a device and its end of a line, and returns
    the child's pid; it may raise OSError."""

    def __init__(self, launch: Callable[[int, socket.socket], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._launch = launch
        self._clock = clock
        self._devices: tuple[int, ...] = ()
        self._waiting: dict[int, _Spare] = {}
        self._not_before: dict[int, float] = {}

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(spare.pid for spare in self._waiting.values())

    def want(self, devices: tuple[int, ...]) -> None:
        """Keep a spare for each of these devices from now on, and for no other."""
        self._devices = devices
        for device in self._waiting.keys() - set(devices):
            self._waiting.pop(device).line.close()

    def due_s(self) -> float | None:
        """Seconds until `refill` has something to do; None when it has nothing."""
        missing = [device for device in self._devices if device not in self._waiting]
        if not missing:
            return None
        return max(0.0, min(self._not_before.get(device, 0.0) for device in missing) - self._clock())

    def refill(self) -> None:
        """Make one that is missing, if it is time."""
        now = self._clock()
        for device in self._devices:
            if device not in self._waiting and self._not_before.get(device, 0.0) <= now:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self._waiting[device] = _Spare(0, ours)  # so that the child finds its own line, too, among those it abandons
                try:
                    self._waiting[device] = _Spare(self._launch(device, theirs), ours)
                except OSError as error:
                    _log.warning("no spare worker for device %d: %s", device, error)
                    self._not_before[device] = now + _AFTER_LOSS_S
                    del self._waiting[device]
                    ours.close()
                finally:
                    theirs.close()
                return

    def take(self, fork: Fork) -> int | None:
        """Let the spare of its device become this instance; its pid, or None where no spare waits."""
        for device in self._devices:  # those that are missing, too, leave this start alone
            self._not_before[device] = max(self._not_before.get(device, 0.0), self._clock() + _AFTER_FORK_S)
        if len(fork.cuda) != 1 or (spare := self._waiting.pop(fork.cuda[0], None)) is None:
            return None
        try:
            spare.line.send(_encoder.encode(fork))
        except OSError:  # it is gone; `lost` will hear of it
            return None
        finally:
            spare.line.close()
        return spare.pid

    def lost(self, pid: int) -> bool:
        """A child has ended; True if it was a spare that nobody has taken."""
        for device, spare in self._waiting.items():
            if spare.pid == pid:
                _log.warning("the spare worker of device %d has ended", device)
                spare.line.close()
                del self._waiting[device]
                self._not_before[device] = self._clock() + _AFTER_LOSS_S
                return True
        return False

    def abandon(self) -> None:
        """In a child: the lines are the zygote's, whose end the spares must notice."""
        for spare in self._waiting.values():
            spare.line.close()


def wait_as_spare(line: socket.socket, open_device: Callable[[], None]) -> tuple[Fork, float] | None:
    """In a spare: make the context, then wait to be told what to become, and when that was; None when the zygote has no use
    for it any more."""
    open_device()
    told = line.recv(_FORK_BYTES)
    line.close()
    return (_decoder.decode(told), time.monotonic()) if told else None


def open_context(device: int) -> None:
    """Make this process's context on a device, and what torch makes with it. Raises what the driver raises."""
    import torch

    from agent.native.device import open_driver

    torch.zeros(1, device=open_driver().torch_device(device)).add_(1).cpu()
    _log.debug("pid %d holds a context of device %d", os.getpid(), device)

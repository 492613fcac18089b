"""The agent's processes, written down so that its next life knows what to wait for and what it may kill."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from agent.daemon.files import write_atomic
from agent.daemon.process import Process, start_ticks
from schema.ids import Epoch
from schema.link import StartInstance, StartPhases

__all__ = ["Roster", "RosterEntry"]

_log = logging.getLogger(__name__)


class RosterEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process: ``role`` is agent, store, zygote, worker or ingest; ``ticks`` tells it from a later one of its pid.

    A worker's entry is written before it is forked, with pid 0. ``phases`` are set once it was ready, ``stop_grace_s`` once
    it was told to stop; ``fetching`` while its checkpoint is on its way to the disk, as it may be after it was ready.
    ``directory`` and ``image_id`` are of the copy that its weights are loaded from, once that is known.
    """

    role: str
    pid: int = 0
    ticks: int = 0
    instance: str = ""
    epoch: Epoch = Epoch(0)
    nonce: int = 0
    start: StartInstance | None = None
    phases: StartPhases | None = None
    stop_grace_s: float | None = None
    fetching: bool = False
    directory: str = ""
    image_id: str = ""

    def open(self) -> Process | None:
        """The process itself if it is alive and surely this one."""
        return Process.open(self.pid, self.ticks) if self.pid > 0 else None


class _File(msgspec.Struct, frozen=True):
    processes: tuple[RosterEntry, ...] = ()


class Roster:
    """``roster.json`` in the run directory, rewritten on every change (not flushed to the disk: it need not survive a boot).

    Where it cannot be written that is logged, and the node goes on without it until a later change can be: processes also
    dial an agent that does not know of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, RosterEntry] = {}
        self._stale = False

    def load(self) -> dict[str, RosterEntry]:
        """What an earlier life wrote, by key, without the agent itself; kept until each is proven dead and removed.

        One that cannot be read is logged and is empty.
        """
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            _log.error("the roster %s cannot be read, so nothing of an earlier life is adopted by it: %s", self._path, error)
            return {}
        self._entries = {_key(entry): entry for entry in found.processes if entry.role != "agent"}
        return dict(self._entries)

    def begin(self) -> None:
        """Write down this agent itself."""
        self.put(RosterEntry(role="agent", pid=os.getpid(), ticks=start_ticks(os.getpid()) or 0))

    def put(self, entry: RosterEntry) -> None:
        """Add an entry, or replace the one of the same role, instance and epoch."""
        self._entries[_key(entry)] = entry
        self._write()

    def remove(self, entry: RosterEntry) -> None:
        """Take an entry out; the process is proven dead."""
        if self._entries.pop(_key(entry), None) is not None:
            self._write()

    def unlink(self) -> None:
        """Remove the file: nothing of ours is left running."""
        self._entries.clear()
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        data = msgspec.json.encode(_File(tuple(self._entries.values())))
        try:
            write_atomic(self._path, msgspec.json.format(data, indent=1), durable=False)
        except OSError as error:
            if not self._stale:
                _log.error("the roster %s cannot be written, and is stale until it can be: %s", self._path, error)
            self._stale = True
        else:
            self._stale = False


def _key(entry: RosterEntry) -> str:
    return f"{entry.role}:{entry.instance}:{entry.epoch}"

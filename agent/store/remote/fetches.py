"""The fetches of a store: one for each digest that is asked for, however often, each op answered once.

Owned by the store's main thread; what blocks runs on a fetch's own threads, which wake the owner.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from agent.native.jobs import Priority, ReadJob, Unit
from agent.store.cache import ArenaStore
from agent.store.catalog import CatalogEntry
from agent.store.remote.fetch import Fetch, FetchJob
from agent.store.remote.open import open_remote
from agent.store.temporary import sweep_left
from schema.checkpoint import Manifest
from schema.errors import Fault, SllmError
from schema.link import Fetching
from schema.remote import RemoteSettings

__all__ = ["FetchListener", "Fetches"]

_PROGRESS_S: Final = 0.1
_log = logging.getLogger(__name__)


class FetchListener(Protocol):
    """Who hears of fetches. Each op gets progress and then exactly one `fetched`."""

    def coming(self, message: Fetching) -> None:
        """All but the weights has come; said once, unless they have come as soon."""

    def fetching(self, op: str, done_bytes: int, total_bytes: int) -> None: ...

    def fetched(self, op: str, digest: str, layout: str, fault: Fault | None, came_bytes: int) -> None:
        """``layout`` "" says nothing of the remote that was asked for: it came from another; ``op`` "" that nobody waits.
        ``came_bytes`` of the weights came from the remote; the others were there, of a fetch that had broken off."""


@dataclass(eq=False)
class _Fetch:
    """One digest on its way, for all ``ops`` that asked. A `FillSource`, once it is prepared."""

    digest: str
    url: str
    ops: dict[str, str]
    """Whoever asked, and for which remote."""
    layout: str
    in_memory: bool
    devices: set[int]
    wake: Callable[[], None]
    fetch: Fetch | None = None
    thread: threading.Thread | None = None
    error: SllmError | None = None
    prepared: bool = False
    begun: bool = False
    cancelled: bool = False
    keep: bool = False
    told: set[str] = field(default_factory=set)
    """The ops that have heard where it comes to lie."""
    job: FetchJob | None = None
    told_at: float = 0.0
    told_bytes: int = -1
    woken_at: float = 0.0
    _outer: list[Callable[[ReadJob], None]] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        assert self.fetch is not None
        return self.fetch.manifest

    @property
    def done_bytes(self) -> int:
        """What is here of the weights, or of the chunks that they come in."""
        return self.fetch.came_bytes(self.job) if self.fetch is not None and self.job is not None else 0

    @property
    def came_bytes(self) -> int:
        return self.job.done_bytes - self.job.spared_bytes if self.job is not None else 0

    def submit(
        self,
        units: Sequence[Unit],
        changed: Callable[[ReadJob], None],
        *,
        priority: Priority,
        unit_done: Callable[[ReadJob, Unit], None] | None = None,
    ) -> ReadJob:
        assert self.fetch is not None
        self._outer.append(changed)
        self.job = self.fetch.submit(units, self._changed, priority=priority, unit_done=unit_done, ended=self.wake)
        return self.job

    def cancel(self, job: ReadJob) -> None:
        assert self.fetch is not None
        self.fetch.cancel(job)

    def do_without(self) -> None:
        """The arena has no room, or has the image: to the disk alone."""
        self.submit((), _ignore, priority=Priority.PREFETCH)

    def _changed(self, job: ReadJob) -> None:
        for changed in self._outer:
            changed(job)
        now = time.monotonic()
        if job.finished or now - self.woken_at >= _PROGRESS_S:
            self.woken_at = now
            self.wake()


class Fetches:
    """``data`` is the node's data directory. ``wake`` is called, from any thread, when `pump` has something to do.

    ``follow`` is asked to take a checkpoint that is coming into the arena on to these devices as it comes.
    """

    def __init__(
        self,
        data: Path,
        checkpoints: Path,
        settings: RemoteSettings,
        store: ArenaStore,
        listener: FetchListener,
        wake: Callable[[], None],
        *,
        disk_bytes: int = 0,
        follow: Callable[[CatalogEntry, tuple[int, ...]], None] = lambda entry, devices: None,
    ) -> None:
        self._follow = follow
        self._data = data
        self._disk_bytes = disk_bytes
        self._checkpoints = checkpoints
        self._settings = settings
        self._store = store
        self._listener = listener
        self._wake = wake
        self._fetches: dict[str, _Fetch] = {}
        self._ending: list[_Fetch] = []

    def ops(self) -> tuple[str, ...]:
        """The ops that wait for an answer."""
        return tuple(op for fetch in self._fetches.values() for op in fetch.ops)

    def begin(
        self,
        op: str,
        digest: str,
        url: str,
        layout: str = "",
        *,
        in_memory: bool = False,
        users: int = 0,
        devices: Iterable[int] = (),
    ) -> None:
        """Fetch a checkpoint to the disk and, with ``in_memory``, into the arena as it comes, where that has room, and from
        there on to ``devices``.

        ``users`` hold it there, until the store hears of others. A digest that is on its way already is not fetched twice,
        wherever from.
        """
        if in_memory:
            self._store.hold(digest, users)
        known = self._fetches.get(digest)
        if known is not None:
            known.ops.setdefault(op, url)
            known.told.discard(op)  # whoever asks again has not heard it
            return
        self._fetches[digest] = _Fetch(digest, url, {op: url}, layout, in_memory, {*devices}, self._wake)
        self._start()

    def cancel(self, op: str, *, keep: bool = False) -> None:
        """Nobody waits for this op any more; it is not answered. The fetch ends with its last op; with ``keep`` what has come
        stays on the disk, for whoever asks next."""
        for digest, fetch in list(self._fetches.items()):
            if op in fetch.ops:
                del fetch.ops[op]
                if not fetch.ops:
                    del self._fetches[digest]
                    if fetch.thread is not None:
                        self._ending.append(fetch)
                        self._end(fetch, keep)

    def pump(self) -> None:
        """Tell the listener what the background has done since the last call. To be called after ``wake``."""
        now = time.monotonic()
        for digest, fetch in list(self._fetches.items()):
            if self._advance(fetch):
                del self._fetches[digest]
                fault = None if fetch.error is None else Fault.of(fetch.error)
                layout = fetch.manifest.layout if fetch.job is not None else ""
                for op, url in fetch.ops.items():
                    self._listener.fetched(op, digest, layout if url == fetch.url else "", fault, fetch.came_bytes)
                if fault is None:
                    self._store.announce(digest)
                else:
                    self._store.disown(digest, f"its copy on the disk came to nothing: {fault.message}")
                continue
            if fetch.begun:
                self._tell_coming(fetch)
            if fetch.job is not None and now - fetch.told_at >= _PROGRESS_S and fetch.told_bytes != fetch.done_bytes:
                fetch.told_at, fetch.told_bytes = now, fetch.done_bytes
                for op in fetch.ops:
                    self._listener.fetching(op, fetch.told_bytes, fetch.manifest.image_bytes)
        ending, self._ending = self._ending, []
        for fetch in ending:
            if not self._advance(fetch):
                self._ending.append(fetch)
            elif fetch.error is not None:
                self._store.disown(fetch.digest, f"its copy on the disk came to nothing: {fetch.error}")
            elif fetch.job is not None:  # it was whole before it heard that nobody waits
                self._listener.fetched("", fetch.digest, fetch.manifest.layout, None, fetch.came_bytes)
                self._store.announce(fetch.digest)
        self._start()

    def close(self) -> None:
        """Break everything off, keeping on the disk what has come; no thread of it runs when this returns."""
        fetches = [*self._fetches.values(), *self._ending]
        self._fetches.clear()
        self._ending.clear()
        for fetch in fetches:
            fetch.cancelled = True
            if fetch.fetch is not None:
                fetch.fetch.stop(keep=True)
        for fetch in fetches:
            if fetch.thread is not None:
                fetch.thread.join()
            if fetch.fetch is not None:
                fetch.fetch.join()
                fetch.fetch.discard()

    def _advance(self, fetch: _Fetch) -> bool:
        """Take the next step of a fetch; True when it is over."""
        if not fetch.prepared:
            return False
        if fetch.thread is not None:
            fetch.thread.join()  # it has nothing left to do
        if fetch.error is not None:
            return True
        if not fetch.begun:
            fetch.begun = True
            assert fetch.fetch is not None
            if fetch.cancelled:
                fetch.fetch.discard()
                return True
            if fetch.in_memory:
                directory = self._checkpoints / fetch.digest / fetch.manifest.layout
                if self._store.fill_from(fetch.digest, directory, fetch) and fetch.devices:
                    self._follow(CatalogEntry(fetch.digest, directory, fetch.manifest), tuple(sorted(fetch.devices)))
            else:
                fetch.do_without()
        assert fetch.fetch is not None
        if not fetch.fetch.over:
            return False
        fetch.fetch.join()
        fetch.error = fetch.fetch.error
        return True

    def _tell_coming(self, fetch: _Fetch) -> None:
        if not (waiting := fetch.ops.keys() - fetch.told):
            return
        assert fetch.fetch is not None
        digest, layout = fetch.digest, fetch.manifest.layout
        directory = str(fetch.fetch.directory.relative_to(self._data))
        image_id = fetch.manifest.image_id
        in_memory = self._store.has_sound(digest, image_id) or self._store.fills(digest, image_id)
        fetch.told |= waiting
        for op in waiting:
            said = Fetching(
                op=op,
                digest=digest,
                image_id=image_id,
                layout=layout,
                directory=directory,
                in_memory=in_memory,
                image_bytes=fetch.manifest.image_bytes,
            )
            self._listener.coming(said)

    def _start(self) -> None:
        """Begin what does not have to wait until an earlier fetch of the same checkpoint, given up, lets go of the disk."""
        ending = {fetch.digest for fetch in self._ending}
        for fetch in self._fetches.values():
            if fetch.thread is None and fetch.digest not in ending:
                fetch.thread = threading.Thread(target=self._prepare, args=(fetch, fetch.layout), name="fetch-prepare")
                fetch.thread.start()

    def _end(self, fetch: _Fetch, keep: bool) -> None:
        fetch.keep = keep  # first, since whoever prepares looks at it when it finds itself cancelled
        fetch.cancelled = True
        if keep and fetch.fetch is not None:
            fetch.fetch.stop(keep=True)
        if fetch.job is not None:
            fetch.cancel(fetch.job)
        elif fetch.fetch is not None:
            fetch.fetch.stop()
        self._wake()

    def _prepare(self, fetch: _Fetch, layout: str) -> None:
        """On the fetch's own thread."""
        try:
            sweep_left(self._data, self._settings.keep_partial_s)
            remote = open_remote(fetch.url, self._settings)
            made = Fetch(
                remote, fetch.digest, layout, self._data, self._checkpoints, self._settings, disk_bytes=self._disk_bytes
            )
            fetch.fetch = made
            if fetch.cancelled:
                made.stop(keep=fetch.keep)
            made.prepare()
        except SllmError as error:
            fetch.error = error
        except Exception as error:  # this thread has no caller
            _log.exception("fetching checkpoint %s failed", fetch.digest)
            fetch.error = SllmError(f"fetching checkpoint {fetch.digest} failed: {type(error).__name__}: {error}")
        fetch.prepared = True
        self._wake()


def _ignore(job: ReadJob) -> None:
    """Nobody but the fetches' owner looks at it."""

"""Any mix of fetches, loads, looks and cancels over a bad remote and a bad disk: one end for each, and nothing is left."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.store import catalog
from agent.store.remote import fetches
from agent.store.remote.api import Body, Interrupted
from agent.store.remote.directory import DirectoryRemote
from agent.store.remote.partial import Partial
from schema.errors import NotFound, OutOfSpace, SllmError, Unauthorised
from schema.remote import RemoteSettings
from tests.agent.store.fetching import FetchBench, open_files
from tests.agent.store.images import CHUNK, commit, read_image
from tests.examples import examples

CHUNKS = 4
SUM_BYTES = 256 << 10
SIZES = (300 << 10, 3 << 20, 5 << 20)
"""Of each of two partitions: the arena has room for the first ones together, and never for the last."""
QUICK = RemoteSettings(streams=2, part_bytes=1 << 20, attempts=2, longest_delay_s=0.0)


class Made(list[tuple[str, bytes]]):
    """Checkpoints on the remote at ``root``: digest and image, by number."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        for number, size in enumerate(SIZES):
            digest, _, image = commit(root, number, size, partitions=2, checksum_bytes=SUM_BYTES)
            self.append((digest, image))

    def __repr__(self) -> str:
        return "made"


class Trouble:
    """What the next readings of the remote, and the next writes and commits here, meet; nothing more once it is over."""

    def __init__(self) -> None:
        self.remote: deque[str] = deque()
        self.disk: deque[str] = deque()
        self.over = threading.Event()

    def end(self) -> None:
        self.remote.clear()
        self.disk.clear()
        self.over.set()

    def next(self, queue: deque[str]) -> str:
        with contextlib.suppress(IndexError):
            return queue.popleft()
        return ""


class BadRemote(DirectoryRemote):
    def __init__(self, root: Path, trouble: Trouble) -> None:
        super().__init__(f"file://{root}", root)
        self._trouble = trouble

    @contextlib.contextmanager
    def open(self, path: str, offset: int, length: int, **more: Any) -> Iterator[Body]:
        what = self._trouble.next(self._trouble.remote)
        if what == "gone":
            raise NotFound(f"{path} is gone")
        if what == "denied":
            raise Unauthorised(f"{path} may not be read")
        if what == "away":
            raise Interrupted(f"{path} is away")
        with super().open(path, offset, length, **more) as body:
            yield BadBody(body, what, self)

    def hang(self) -> None:
        while not self._trouble.over.wait(0.001):
            self.check_stop()


class BadBody(Body):
    def __init__(self, body: Body, what: str, remote: BadRemote) -> None:
        self._body, self._what, self._remote = body, what, remote
        self._came = 0

    def some(self, view: memoryview) -> int:
        if self._what == "hangs" and self._came:
            self._remote.hang()
        if self._what == "short" and self._came:
            raise Interrupted("it broke off")
        count = self._body.some(view[: 100_000 if self._what else len(view)])
        if self._what == "wrong" and not self._came:
            view[0] ^= 1
        self._came += count
        return count


def break_disk(monkeypatch: pytest.MonkeyPatch, trouble: Trouble) -> None:
    write, put = Partial.write, Partial.commit

    def meet() -> None:
        match trouble.next(trouble.disk):
            case "full":
                raise OutOfSpace("the disk is full")
            case "eio":
                raise SllmError("the disk is broken")

    def bad_write(self: Partial, *given: Any) -> None:
        meet()
        write(self, *given)

    def bad_commit(self: Partial) -> None:
        meet()
        put(self)

    monkeypatch.setattr(Partial, "write", bad_write)
    monkeypatch.setattr(Partial, "commit", bad_commit)


@pytest.fixture(scope="module")
def made() -> Iterator[Made]:
    with tempfile.TemporaryDirectory(prefix="sl") as root:
        yield Made(Path(root))


NUMBERS = st.integers(0, len(SIZES) - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("fetch"), NUMBERS, st.booleans()),
    st.tuples(st.just("fetch"), NUMBERS, st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("fill"), NUMBERS, st.integers(0, 1)),
    st.tuples(st.just("verify"), NUMBERS),
    st.tuples(st.just("hold"), NUMBERS, st.integers(0, 1)),
    st.tuples(st.just("remove"), NUMBERS),
    st.tuples(st.just("remote"), st.sampled_from(["gone", "denied", "away", "hangs", "short", "wrong", ""])),
    st.tuples(st.just("disk"), st.sampled_from(["full", "eio", ""])),
    st.tuples(st.just("turn")),
    st.tuples(st.just("news")),
)


@given(actions=st.lists(ACTIONS, min_size=5, max_size=30))
@settings(max_examples=examples(40), suppress_health_check=list(HealthCheck), deadline=None)
def test_each_fetch_ends_once_and_nothing_is_left(made: Made, actions: list[Any]) -> None:
    trouble = Trouble()
    with tempfile.TemporaryDirectory(prefix="sl") as data, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fetches, "open_remote", lambda url, settings: BadRemote(made.root, trouble))
        break_disk(monkeypatch, trouble)
        bench = FetchBench(Path(data), QUICK, chunks=CHUNKS)
        try:
            play(bench, made, trouble, actions)
        finally:
            trouble.end()
            bench.close()
        assert not [name for name in open_files() if name.startswith(data)], "descriptors have leaked"


def play(bench: FetchBench, made: Made, trouble: Trouble, actions: list[Any]) -> None:
    asked: list[str] = []
    cancelled: set[str] = set()
    others: list[str] = []

    def directory(number: int) -> Path:
        return bench.data / "checkpoints" / made[number][0] / "exec1"

    for action in actions:
        match action:
            case "fetch", number, in_memory:
                asked.append(f"fetch{len(asked)}")
                bench.fetches.begin(asked[-1], made[number][0], "file:///any", in_memory=in_memory, users=int(in_memory))
            case "cancel", back, keep:
                op = asked[max(0, len(asked) - 1 - back)] if asked else ""
                if op and op not in bench.answers:
                    cancelled.add(op)
                    bench.fetches.cancel(op, keep=keep)
            case "fill", number, users:
                others.append(f"fill{len(others)}")
                bench.store.fill(others[-1], made[number][0], directory(number), users)
            case "verify", number:
                others.append(f"verify{len(others)}")
                bench.store.verify(others[-1], made[number][0], directory(number))
            case "hold", number, users:
                bench.store.hold(made[number][0], users)
            case "remove", number:
                shutil.rmtree(directory(number), ignore_errors=True)
            case "remote", what:
                trouble.remote.append(what)
            case "disk", what:
                trouble.disk.append(what)
            case "turn", *_:
                turn(bench)
            case _:
                with contextlib.suppress(AssertionError):
                    bench.turn(0.01)
                turn(bench)
    trouble.end()
    bench.until(lambda: {*asked} - cancelled <= bench.answers.keys() and {*others} <= answered(bench))
    assert bench.fetches.ops() == ()
    assert not cancelled & bench.answers.keys()
    assert bench.store.filling() == ()
    for digest, _ in made:
        bench.store.hold(digest, 0)
    bench.until(lambda: quiet(bench))
    for resident in bench.store.residents():
        assert read_image(bench.arena.descriptor, resident) == made[int(resident.digest, 16)][1]
        bench.store.drop(resident.digest)
    assert bench.store.arena.used_bytes == 0
    for entry in catalog.scan(bench.data / "checkpoints").values():
        assert entry.quarantined is None
    for number, (digest, image) in enumerate(made):  # all of it can be had as if nothing had been
        assert bench.get(digest, "file:///any", in_memory=not number) is None
        assert (catalog.is_verified(directory(number)), weights(directory(number))) == (True, image)


def answered(bench: FetchBench) -> set[str]:
    """The loads and the looks that are."""
    return {*bench.told.resident, *bench.told.faults, *bench.told.verdicts}


def turn(bench: FetchBench) -> None:
    bench.store.pump()
    bench.fetches.pump()


def quiet(bench: FetchBench) -> bool:
    """True when nothing is under way any more, also of what nobody waits for."""
    resident = sum(-(-each.image_bytes // CHUNK) for each in bench.store.residents())
    return not bench.fetches._ending and bench.store.arena.used_bytes == resident * CHUNK


def weights(directory: Path) -> bytes:
    return b"".join((directory / f"partition_{number}.bin").read_bytes() for number in range(2))

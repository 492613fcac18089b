"""Our loads, each in fresh processes, over the production code: what `python -m bench.load` starts and times.

    python -m bench.load.ours ROLE LAYOUT_DIRECTORY

``arena``    the store alone: its reader and arena, from manifest to resident
``tensors``  the whole way of an instance start: a store process fills its arena while the worker reads its manifest; then the
             worker gets extents and a descriptor over a socket, maps the image and lays its tensors over it
``attach``   the worker's part alone, over and over, for an image that is resident
``store``    internal: the store process of ``tensors`` and ``attach``
``ingest``   LAYOUT_DIRECTORY is a Hugging Face directory here: makes a checkpoint of it in a directory beside, and deletes it

Each prints "ready" when all is imported and its arena is touched, waits for a line, works, and prints JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.native.mapping import ImageMapping, read_only
from agent.store.catalog import CatalogEntry, read_entry
from agent.store.index import TensorIndex, read_index
from agent.store.trial import TrialStore, cpu_s
from schema.link import Extent

CHUNK_BYTES = 4 << 20
READER_THREADS = 4
ATTACHES = 15


def arena(directory: Path) -> dict[str, Any]:
    store, entry = _trial_store(directory)
    _await_go()
    resident, timing = store.fill(entry)
    beyond = _beyond_arena_bytes()
    mapping = ImageMapping(store.arena.descriptor, resident.extents, resident.image_bytes)
    return {
        "seconds": timing.seconds, "cpu_s": timing.cpu_s, "bytes": resident.image_bytes, "pages": store.arena.pages,
        "beyond_arena_bytes": beyond, **_proof(read_index(directory, entry.manifest), mapping.buffer),
    }  # fmt: skip


def tensors(directory: Path) -> dict[str, Any]:
    """Manifest read, decoded and checked by both processes, as in production."""
    _import_worker()
    from agent.engine.image import image_tensors

    with _Store(directory) as store:
        _warm_attach()
        _await_go()
        began, began_cpu_s = time.perf_counter(), cpu_s()
        store.ask_fill()
        index = read_index(directory, read_entry(directory).manifest)
        descriptor, answer = store.filled()
        given = time.perf_counter()
        mapping = ImageMapping(descriptor, answer["extents"], answer["image_bytes"])
        made = image_tensors(index, mapping.buffer)
        ended = time.perf_counter()
        used_s = cpu_s() - began_cpu_s + answer["cpu_s"]
        touched = time.perf_counter()
        np.frombuffer(mapping.buffer, np.uint8)[:: os.sysconf("SC_PAGESIZE")].max()
        touch_s = time.perf_counter() - touched
        return {
            "seconds": ended - began, "cpu_s": used_s, "attach_s": ended - given, "fill_s": answer["fill_s"],
            "first_touch_s": touch_s, "bytes": answer["image_bytes"], "tensors": len(made), "pages": answer["pages"],
            **_proof(index, mapping.buffer),
        }  # fmt: skip


def attach(directory: Path) -> dict[str, Any]:
    """From an image that lies there to tensors: their list read and checked, the mapping, the tensors. The manifest, which is
    as long as the weights are many, is timed apart: a worker reads it before it hears of the image."""
    _import_worker()
    from agent.engine.image import image_tensors

    with _Store(directory) as store:
        _warm_attach()
        _await_go()
        began = time.perf_counter()
        manifest = read_entry(directory).manifest
        manifest_s = time.perf_counter() - began
        store.ask_fill()
        descriptor, answer = store.filled()
        times, used = [], []
        for _ in range(ATTACHES):
            began, began_cpu_s = time.perf_counter(), time.thread_time()
            index = read_index(directory, manifest)
            mapping = ImageMapping(descriptor, answer["extents"], answer["image_bytes"])
            made = image_tensors(index, mapping.buffer)
            times.append(time.perf_counter() - began)
            used.append(time.thread_time() - began_cpu_s)
            count = len(made)
            del made
            mapping.close()
        return {
            "attach_s": times,
            "attach_cpu_s": used,
            "manifest_s": manifest_s,
            "tensors": count,
            "bytes": answer["image_bytes"],
        }


def ingest(source: Path) -> dict[str, Any]:
    _import_worker()
    from agent.engine.skeleton import build_skeleton  # noqa: F401  what an ingest imports, before the time is taken
    from agent.store.ingest.convert import convert

    data = Path(tempfile.mkdtemp(prefix="ingest-", dir=source.parent))
    try:
        _await_go()
        before = _memory_bytes("VmHWM")
        began, began_cpu_s = time.perf_counter(), cpu_s()
        convert(source, data / "checkpoints", data / "tmp", lambda done, total: None)
        seconds = time.perf_counter() - began
        written = sum(path.stat().st_size for path in (data / "checkpoints").rglob("*") if path.is_file())
        peak = _memory_bytes("VmHWM")
        used_s = cpu_s() - began_cpu_s
        return {"seconds": seconds, "cpu_s": used_s, "bytes": written, "before_rss_bytes": before, "peak_rss_bytes": peak}
    finally:
        shutil.rmtree(data)


def _trial_store(directory: Path) -> tuple[TrialStore, CatalogEntry]:
    entry = read_entry(directory)
    store = TrialStore(entry.manifest.image_bytes, chunk_bytes=CHUNK_BYTES, reader_threads=READER_THREADS)
    store.open_store()
    return store, entry


def _proof(index: TensorIndex, image: memoryview) -> dict[str, Any]:
    """The sum of all 8-byte words of all tensors, which does not depend on how they lie."""
    check = total = 0
    for start, size in zip(index.starts.tolist(), index.sizes.tolist(), strict=True):
        check += int(np.frombuffer(image, np.uint8, size, start).view("<u8").sum())
        total += size
    return {"check": check % 2**64, "tensor_bytes": total}


def _beyond_arena_bytes() -> int:
    """What this process holds in memory, without shared memory: its arena is that, or huge pages, which are not counted."""
    return _memory_bytes("RssAnon", "RssFile")


def _memory_bytes(*names: str) -> int:
    """The sum of these fields of this process's status. (ru_maxrss would begin with what the parent had.)"""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in names)


def _import_worker() -> None:
    import torch

    import agent.engine.image

    assert torch.__version__
    assert agent.engine.image


def _warm_attach() -> None:
    """A worker comes from a zygote that has made tensors before: the first one of a process costs a millisecond."""
    import torch

    torch.empty(0, dtype=torch.bfloat16).set_(torch.zeros(64, dtype=torch.uint8).untyped_storage(), 0, (4, 4), (4, 1))


def _await_go() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


class _Store:
    """The store process, and the worker's end of the socket to it."""

    def __init__(self, directory: Path) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load.ours", "store", str(directory), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        assert self._socket.recv(16) == b"ready"

    def ask_fill(self) -> None:
        self._socket.sendall(b"fill")

    def filled(self) -> tuple[int, dict[str, Any]]:
        data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        answer = msgspec.msgpack.decode(data)
        answer["extents"] = msgspec.convert(answer["extents"], tuple[Extent, ...])
        return descriptors[0], answer

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait(60)


def _serve_store(directory: Path, descriptor: int) -> None:
    peer = socket.socket(fileno=descriptor)
    store, entry = _trial_store(directory)
    peer.sendall(b"ready")
    while peer.recv(16):
        began, began_cpu_s = time.perf_counter(), cpu_s()
        resident, timing = store.fill(entry)
        answer = {
            "extents": resident.extents, "image_bytes": resident.image_bytes, "fill_s": timing.seconds,
            "pages": store.arena.pages, "cpu_s": cpu_s() - began_cpu_s, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        copy = read_only(store.arena.descriptor)
        socket.send_fds(peer, [msgspec.msgpack.encode(answer)], [copy])
        os.close(copy)
    store.close()


def main() -> None:
    role, directory = sys.argv[1], Path(sys.argv[2])
    if role == "store":
        _serve_store(directory, int(sys.argv[3]))
        return
    roles: dict[str, Callable[[Path], dict[str, Any]]] = {
        "arena": arena,
        "tensors": tensors,
        "attach": attach,
        "ingest": ingest,
    }
    answer = roles[role](directory)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # views of the arena are still about; they need no orderly end


if __name__ == "__main__":
    main()

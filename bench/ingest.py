"""How fast a checkpoint is ingested, against what the machine reads, writes and hashes, all measured in the same run.

Each round, in turn: the source is read cold with direct reads; as many bytes are written to a new file with direct writes, and
made durable; both at once, each block read and then written, as an ingest must; as many are hashed as ingest must (sha256 and
xxh3) on every core; and the source is ingested, cold and then out of the page cache (`memory`, where the disk only writes), by
processes of their own, from the first look at the source to the last fsync, imports not counted. All in the same 4 MiB blocks.

    python -m bench.ingest DIRECTORY [--rounds 5] [--architecture tensors-200] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from agent.native.blocks import block_memory
from agent.native.cold import forget, remember
from bench import make_checkpoint
from bench.load.prepare import SPECS

_BLOCK = 4 << 20
_DISK_THREADS = 8

_CHILD = """
import json, resource, sys, time
from pathlib import Path
import agent.engine.skeleton, agent.store.ingest.text
from agent.store.ingest.convert import convert
before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
began, used = time.perf_counter(), time.process_time()
convert(Path(sys.argv[1]), Path(sys.argv[2]) / "checkpoints", Path(sys.argv[2]) / "tmp", lambda done, total: None)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"s": time.perf_counter() - began, "cpu_s": time.process_time() - used, "memory_mib": usage.ru_maxrss >> 10,
                  "before_mib": before_mib}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="on the disk to measure; some 8 GB are written there and deleted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--architecture", default="tensors-200")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.directory / "ingest-bench"
    work.mkdir(parents=True)
    try:
        result = _measure(work, arguments.architecture, arguments.rounds)
    finally:
        shutil.rmtree(work)
    _show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def _measure(work: Path, architecture: str, rounds: int) -> dict[str, Any]:
    make_checkpoint.ARCHITECTURES.update(SPECS)
    source = work / "source"
    make_checkpoint.make_checkpoint(architecture, source, shard_bytes=1 << 62)
    (weights,) = source.glob("*.safetensors")
    size = weights.stat().st_size // _BLOCK * _BLOCK
    runs: list[dict[str, float]] = []
    for _ in range(rounds):
        one = {"read": size / _read(weights, size), "write": size / _write(work / "written", size)}
        one |= {"copy": size / _copy(weights, work / "written", size), "hash": size / _hash(size)}
        forget(weights)
        child = _ingest(source, work / "data")
        remember(weights)
        warm = _ingest(source, work / "data")
        one |= {"ingest": weights.stat().st_size / child["s"], "memory": weights.stat().st_size / warm["s"], **child}
        one["ratio"] = one["ingest"] / min(one["read"], one["write"], one["hash"])
        one["copy_ratio"] = one["ingest"] / min(one["copy"], one["hash"])
        one["memory_ratio"] = one["memory"] / min(one["write"], one["hash"])
        runs.append(one)
    return {"architecture": architecture, "bytes": weights.stat().st_size, "cores": os.cpu_count(), "runs": runs}


def _ingest(source: Path, target: Path) -> dict[str, float]:
    (target / "checkpoints").mkdir(parents=True)
    (target / "tmp").mkdir()
    command = [sys.executable, "-c", _CHILD, str(source), str(target)]
    answer = dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
    shutil.rmtree(target)
    return answer


def _blocks(threads: int, size: int, work: Callable[[memoryview, int], object]) -> float:
    """Seconds to do ``work`` on every block, on memory that each thread has touched before."""

    def share(first: int) -> None:
        memory = memories[first]
        for at in range(first * _BLOCK, size, threads * _BLOCK):
            work(memory, at)

    memories = [block_memory(_BLOCK) for _ in range(threads)]
    for memory in memories:
        memory[:] = os.urandom(_BLOCK)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
    return time.perf_counter() - began


def _read(path: Path, size: int) -> float:
    forget(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return _blocks(_DISK_THREADS, size, lambda memory, at: os.preadv(descriptor, [memory], at))
    finally:
        os.close(descriptor)


def _write(path: Path, size: int) -> float:
    return _put(path, size, lambda memory, at: None)


def _copy(source: Path, path: Path, size: int) -> float:
    forget(source)
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECT)
    try:
        return _put(path, size, lambda memory, at: os.preadv(descriptor, [memory], at))
    finally:
        os.close(descriptor)


def _put(path: Path, size: int, fill: Callable[[memoryview, int], object]) -> float:
    """Seconds to write a file of blocks that ``fill`` gives, until they are durable."""

    def put(memory: memoryview, at: int) -> None:
        fill(memory, at)
        os.pwrite(descriptor, memory, at)

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        os.posix_fallocate(descriptor, 0, size)
        took = _blocks(_DISK_THREADS, size, put)
        began = time.perf_counter()
        os.fsync(descriptor)
        return took + time.perf_counter() - began
    finally:
        os.close(descriptor)
        path.unlink()


def _hash(size: int) -> float:
    def both(memory: memoryview, at: int) -> None:
        hashlib.sha256(memory).digest()
        xxhash.xxh3_64_intdigest(memory)

    return _blocks(os.cpu_count() or 1, size, both)


def _show(result: dict[str, Any]) -> None:
    runs = result["runs"]
    print(f"{result['architecture']}, {result['bytes'] / 1e9:.2f} GB, {result['cores']} cores, medians of {len(runs)} rounds")
    for name in ("read", "write", "copy", "hash", "ingest", "memory"):
        print(f"{name:8} {statistics.median(run[name] for run in runs) / 1e9:6.2f} GB/s")
    for name, what in (
        ("ratio", "ingest / min(read, write, hash)"),
        ("copy_ratio", "ingest / min(copy, hash)"),
        ("memory_ratio", "memory / min(write, hash)"),
    ):
        ratios = [run[name] for run in runs]
        print(f"{what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    cpu = statistics.median(run["cpu_s"] for run in runs) / result["bytes"] * 1e9
    memory = max(run["memory_mib"] for run in runs)
    print(
        f"{cpu:.2f} CPU-seconds per GB, memory {memory} MiB, of which {max(run['before_mib'] for run in runs)} before it began"
    )


if __name__ == "__main__":
    raise SystemExit(main())

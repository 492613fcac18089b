"""Show, and time, the device tier itself on a GPU: the store's own loads, its descriptors after its death, a worker's attach.

Run on a machine with an NVIDIA device, cuda-bindings and torch with CUDA. Prints one `name<TAB>value` line per finding, "not
run" where there is no device; exits 1 if a proof fails or a bound is missed.

1. An image in DRAM is copied to the device by the store's copier, against one pinned host-to-device copy of the same memory.
2. An image that does not fit into DRAM streams from disk through the ring, cold, against the disk alone and the link.
3. A process that has loaded weights is killed; another store adopts the descriptor, a worker attaches it, compares every byte,
   and is killed too; the next worker finds the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from agent.native.address import address_of
from agent.native.arena import Arena
from agent.native.device import DeviceMemory, NoDriver, open_driver
from agent.native.dlpack import bytes_capsule
from agent.native.pinned import HostMemory
from agent.native.reader import Priority, ReadPool, Unit
from agent.store import catalog
from agent.store.cache import ArenaStore
from agent.store.devices import DeviceStore
from schema.checkpoint import FORMAT_VERSION, KvGeometry, Manifest, Partition, TextDefaults, encode_manifest
from schema.errors import Fault
from schema.link import Arriving, DeviceWeights, LayersArrived, Resident
from schema.states import Tier

CHUNK = 4 << 20
ROUNDS = 5
_SELF = ("-m", "bench.gpu.device_tier")


def report(name: str, value: object) -> None:
    print(f"{name}\t{value:.4g}" if isinstance(value, float) else f"{name}\t{value}", flush=True)


def commit(root: Path, number: int, size_bytes: int) -> tuple[str, Path]:
    """A checkpoint of seeded bytes, marked as verified: what is timed is reading and copying."""
    digest, partition = f"{number:064x}", "partition_0.bin"
    directory = root / digest / "exec1"
    directory.mkdir(parents=True)
    sums = []
    with (directory / partition).open("wb") as file:
        for index in range(size_bytes // CHUNK):
            data = hashlib.shake_128(f"{number}/{index}".encode()).digest(1 << 16) * (CHUNK >> 16)
            sums.append(xxhash.xxh3_64_intdigest(data))
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest = Manifest(
        format_version=FORMAT_VERSION, digest=digest, layout="exec1", architecture="LlamaForCausalLM", parameters=0,
        vocab_size=1, max_context_tokens=1, chunk_bytes=CHUNK, tensors=(),
        partitions=(Partition(partition, 0, size_bytes, tuple(sums)),),
        ties={}, kv=KvGeometry(1, 1, 1, "F32"), config={}, text=TextDefaults(), assets=(),
    )  # fmt: skip
    (directory / "manifest.json").write_bytes(encode_manifest(manifest))
    catalog.mark_verified(directory)
    return digest, directory


class Node:
    """Arena, store and device tier in one process, and the agent's part: descriptors kept, released when told."""

    def __init__(self, driver: Any, arena_bytes: int) -> None:
        self.answers: dict[str, tuple[DeviceWeights, ...] | Fault] = {}
        self.kept: dict[str, tuple[DeviceWeights, int]] = {}
        self._gone: list[str] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self.arena = Arena.create(arena_bytes, CHUNK)
        self.dram = ArenaStore(self.arena, self, reader_threads=4, wake=self._wake)
        budgets = {device.index: device.memory_bytes // 10 * 9 for device in driver.devices()}
        host = ((address_of(self.arena.memory), self.arena.memory.nbytes),)
        self.devices = DeviceStore(driver, budgets, self.dram, host, self, self._wake)

    def _wake(self) -> None:
        os.eventfd_write(self._event, 1)

    def progress(self, op: str, done_bytes: int, total_bytes: int) -> None: ...
    def copying(self, op: str, done_bytes: int, total_bytes: int, source: Tier) -> None: ...
    def arriving(self, message: Arriving | LayersArrived) -> None: ...
    def filled(self, op: str, resident: Resident) -> None: ...
    def verifying(self, op: str, stage: str, done_bytes: int, total_bytes: int) -> None: ...
    def verified(self, op: str, digest: str, fault: Fault | None) -> None: ...
    def condemned(self, resident: Resident) -> None: ...
    def evicted(self, digest: str, why: str, for_digest: str) -> None: ...
    def layers_usable(self, digest: str, count: int) -> None: ...

    def failed(self, op: str, digest: str, fault: Fault) -> None:
        self.answers[op] = fault

    def loaded(self, weights: DeviceWeights, descriptor: int) -> None:
        self.kept[weights.id] = weights, os.dup(descriptor)

    def on_device(self, op: str, digest: str, weights: tuple[DeviceWeights, ...], source: Tier, read_bytes: int) -> None:
        self.answers[op] = weights

    def evicting(self, weights: DeviceWeights, why: str, for_digest: str) -> None:
        self._gone.append(weights.id)

    def load(self, op: str, digest: str, directory: Path) -> tuple[DeviceWeights, float]:
        """Weights on device 0, and how long it took. Raises RuntimeError when it failed."""
        began = time.monotonic()
        self.devices.fill(op, digest, directory, (0,), 1, Priority.REQUEST)
        while op not in self.answers:
            self._turn()
        answer = self.answers[op]
        if isinstance(answer, Fault):
            raise RuntimeError(answer.message)
        return answer[0], time.monotonic() - began

    def drop(self, digest: str) -> None:
        self.devices.hold(digest, 0, 0)
        self.devices.drop(digest)
        self._turn()

    def _turn(self) -> None:
        select.select([self._event], [], [], 0.001)
        self.dram.pump()
        self.devices.pump()
        gone, self._gone = self._gone, []
        for name in gone:
            os.close(self.kept.pop(name)[1])
            self.devices.released(name)

    def close(self) -> None:
        self.devices.close()
        self.dram.close()
        self.arena.close()
        for _, descriptor in self.kept.values():
            os.close(descriptor)


def pinned_bps(driver: Any, host: HostMemory, address: int, size: int) -> float:
    """Host to device from memory that is registered already: asynchronous copies of up to 256 MiB, median of five."""
    memory: DeviceMemory = driver.allocate(0, size)
    stream = driver.stream(0)
    times = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        for at, length in host.cut(address, size, 256 << 20):
            driver.copy(stream, memory, at - address, at, length)
        event = driver.record(stream)
        while not driver.occurred(event):
            pass
        times.append(time.monotonic() - began)
        driver.close_event(event)
    driver.close_stream(stream)
    driver.free(memory)
    return size / statistics.median(times)


def drop_cache(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bps(path: Path, size: int, memory: memoryview) -> float:
    """The same reader, into the same memory, without a device."""
    import threading

    pool, done = ReadPool(4), threading.Event()
    units = [Unit(path, size, at, (memory[at % len(memory) : at % len(memory) + CHUNK],)) for at in range(0, size, CHUNK)]
    began = time.monotonic()
    pool.submit(units, lambda job: done.set() if job.finished else None)
    done.wait()
    took_s = time.monotonic() - began
    pool.close()
    return size / took_s


def attached(driver: Any, descriptor: int, weights: DeviceWeights) -> tuple[Any, float]:
    """The weights as a tensor of bytes, and how long the attach took, contexts aside."""
    from torch.utils.dlpack import from_dlpack

    driver.free(driver.allocate(0, 1))  # the context is made, as a worker makes it while weights are loading
    began = time.monotonic()
    memory = driver.attach(0, descriptor, weights.size_bytes)
    capsule = bytes_capsule(memory.address, weights.image_bytes, driver.dlpack_type, 0, lambda: driver.free(memory))
    return from_dlpack(capsule), time.monotonic() - began


def right(tensor: Any, path: Path) -> bool:
    """Every byte on the device is what the file has."""
    with path.open("rb") as file:
        for at in range(0, len(tensor), 64 << 20):
            if bytes(tensor[at : at + (64 << 20)].cpu().numpy()) != file.read(64 << 20):
                return False
    return True


# --- the processes of the third part


def role_store(root: Path, sock: socket.socket, size: int) -> None:
    node = Node(open_driver(), size + (64 << 20))
    weights, _ = node.load("a", f"{1:064x}", root / f"{1:064x}" / "exec1")
    told = {"id": weights.id, "size_bytes": weights.size_bytes, "image_bytes": weights.image_bytes}
    socket.send_fds(sock, [json.dumps(told).encode()], [node.kept[weights.id][1]])
    signal.pause()


def role_worker(root: Path, sock: socket.socket, size: int) -> None:
    data, (descriptor,), _, _ = socket.recv_fds(sock, 4096, 1)
    weights = DeviceWeights(digest=f"{1:064x}", device=0, **json.loads(data))
    tensor, attach_s = attached(open_driver(), descriptor, weights)
    good = right(tensor, root / f"{1:064x}" / "exec1" / "partition_0.bin")
    sock.send(json.dumps({"good": good, "attach_s": attach_s}).encode())
    signal.pause()


@contextmanager
def process(role: str, root: Path, size: int) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    with theirs:
        args = [sys.executable, *_SELF, role, "--root", str(root), "--bytes", str(size)]
        child = subprocess.Popen([*args, "--socket", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    try:
        yield child, ours
    finally:
        child.kill()
        child.wait()
        ours.close()


def outlive(driver: Any, root: Path, size: int) -> bool:
    with process("store", root, size) as (_, sock):
        data, (descriptor,), _, _ = socket.recv_fds(sock, 4096, 1)
    told = json.loads(data)  # the store is dead
    node = Node(driver, 64 << 20)
    weights = DeviceWeights(digest=f"{1:064x}", device=0, **told)
    adopted = node.devices.adopt(weights, os.dup(descriptor))
    node.kept[weights.id] = weights, os.dup(descriptor)
    again, load_s = node.load("b", weights.digest, root / weights.digest / "exec1")
    report("store_killed.adopted", adopted and again.id == weights.id)
    report("store_killed.next_start_load_s", load_s)
    good = adopted and again.id == weights.id
    for attempt in (1, 2):
        with process("worker", root, size) as (_, sock):
            socket.send_fds(sock, [data], [descriptor])
            answer = json.loads(sock.recv(4096))
        report(f"worker{attempt}.every_byte_right", answer["good"])
        report(f"worker{attempt}.attach_s", answer["attach_s"])
        good = good and answer["good"] and answer["attach_s"] < 0.05
    os.close(descriptor)
    node.close()
    return bool(good)


def timed(node: Node, digest: str, directory: Path, before: Callable[[], None]) -> float:
    times = []
    for number in range(ROUNDS):
        before()
        times.append(node.load(f"{digest}-{number}", digest, directory)[1])
        node.drop(digest)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["store", "worker"])
    parser.add_argument("--bytes", type=int, default=4 << 30)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--socket", type=int)
    args = parser.parse_args()
    size = args.bytes // CHUNK * CHUNK
    if args.role:
        (role_store if args.role == "store" else role_worker)(args.root, socket.socket(fileno=args.socket), size)
        return 0
    try:
        driver = open_driver()
    except NoDriver as error:
        for name in ("dram_to_device", "disk_to_device", "store_killed", "worker1", "worker2"):
            report(name, "not run")
        print(error)
        return 0
    with tempfile.TemporaryDirectory(dir=args.root) as place:
        root = Path(place)
        digest, directory = commit(root, 1, size)
        good = True

        node = Node(driver, size + (64 << 20))
        node.load("first", digest, directory)  # by way of DRAM, where it stays; and everything is pinned now
        node.drop(digest)
        dram_bps = size / timed(node, digest, directory, lambda: None)
        copies = node.dram.views(digest, 0, size)
        host = HostMemory(driver)
        host.add(address_of(node.arena.memory), node.arena.memory.nbytes)
        bound_bps = pinned_bps(driver, host, address_of(copies[0]), len(copies[0]))
        report("pinned_h2d_gbps", bound_bps / 1e9)
        report("dram_to_device_gbps", dram_bps / 1e9)
        report("dram_to_device.ratio", dram_bps / bound_bps)
        good = good and dram_bps >= 0.97 * bound_bps
        node.close()

        node = Node(driver, 64 << 20)
        rates = []
        for _ in range(ROUNDS):
            drop_cache(directory)
            rates.append(disk_bps(directory / "partition_0.bin", size, node.arena.memory[-(32 << 20) :]))
        cold_bps = size / timed(node, digest, directory, lambda: drop_cache(directory))
        least = min(statistics.median(rates), bound_bps)
        report("disk_gbps", statistics.median(rates) / 1e9)
        report("disk_to_device_gbps", cold_bps / 1e9)
        report("disk_to_device.ratio", cold_bps / least)
        good = good and cold_bps >= 0.95 * least
        node.close()

        good = outlive(driver, root, size) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""A driver without a device: memory is a memfd, a stream is a thread that copies in order, and every call can be made to fail.

What is allocated counts until nothing in this process holds its memfd any more, as a device's memory does. Copies keep the rule
of registrations: one that crosses from one into the next is refused, as CUDA does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.native.device import DLPACK_CPU, DeviceError, DeviceMemory, DeviceProperties
from schema.errors import OutOfSpace

GRANULARITY = 2 << 20


@dataclass(eq=False)
class FakeStream:
    device: int
    tasks: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    broken: str = ""
    thread: threading.Thread | None = None


@dataclass(eq=False)
class FakeEvent:
    stream: FakeStream
    done: threading.Event = field(default_factory=threading.Event)


class FakeDriver:
    """``slow_s`` is added to each copy; ``failing`` names calls to fail and how often; ``gate``, when cleared, holds copies."""

    dlpack_type = DLPACK_CPU

    def __init__(self, sizes: tuple[int, ...] = (64 << 20,), *, slow_s: float = 0.0) -> None:
        self.sizes = sizes
        self.slow_s = slow_s
        self.failing: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.on_copy: Callable[[int], None] = lambda number: None
        """Called on the stream's thread before each copy; what it raises is how the copy fails."""
        self.copies: list[tuple[int, int, int]] = []
        """Device, offset and size of every copy queued."""
        self.allocations: dict[int, DeviceMemory] = {}
        self.streams: set[FakeStream] = set()
        self.events: set[FakeEvent] = set()
        self.registered: dict[int, int] = {}
        self._areas: dict[int, tuple[int, mmap.mmap]] = {}
        self._made: dict[tuple[int, int], tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._copied = 0

    @property
    def leaked(self) -> dict[str, int]:
        """What is still there of each kind of thing that has to be given back, registrations aside."""
        found = {"allocations": len(self.allocations), "streams": len(self.streams), "events": len(self.events)}
        return {name: count for name, count in found.items() if count}

    def used(self, device: int) -> int:
        """Bytes of the device that something in this process holds."""
        held = set()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                status = entry.stat()
                held.add((status.st_dev, status.st_ino))
        self._made = {inode: made for inode, made in self._made.items() if inode in held}
        return sum(size for of, size in self._made.values() if of == device)

    def devices(self) -> tuple[DeviceProperties, ...]:
        return tuple(DeviceProperties(index, f"Fake {index}", size) for index, size in enumerate(self.sizes))

    def torch_device(self, device: int) -> str:
        return "cpu"

    def allocate(self, device: int, size_bytes: int) -> DeviceMemory:
        self._fail("allocate")
        size_bytes = -(-size_bytes // GRANULARITY) * GRANULARITY
        with self._lock:
            if self.used(device) + size_bytes > self.sizes[device]:
                raise OutOfSpace("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY; the device has no memory left")
            descriptor = os.memfd_create(f"fake-device-{device}")
            os.ftruncate(descriptor, size_bytes)
            status = os.fstat(descriptor)
            self._made[status.st_dev, status.st_ino] = device, size_bytes
        return self._map(device, descriptor, size_bytes)

    def export(self, memory: DeviceMemory) -> int:
        self._fail("export")
        return os.dup(self._areas[memory.address][0])

    def attach(self, device: int, descriptor: int, size_bytes: int) -> DeviceMemory:
        self._fail("attach")
        if os.fstat(descriptor).st_size != size_bytes:
            raise DeviceError("cuMemMap: CUDA_ERROR_INVALID_VALUE")
        return self._map(device, os.dup(descriptor), size_bytes)

    def free(self, memory: DeviceMemory) -> None:
        del self.allocations[memory.address]
        descriptor, area = self._areas.pop(memory.address)
        with contextlib.suppress(BufferError):  # a test's view of it is still alive
            area.close()
        os.close(descriptor)

    def register(self, address: int, size_bytes: int) -> None:
        self._fail("register")
        assert address % mmap.PAGESIZE == 0
        assert size_bytes % mmap.PAGESIZE == 0
        assert not self._ranges(address, size_bytes), "registered twice"
        self.registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def stream(self, device: int) -> FakeStream:
        self._fail("stream")
        stream = FakeStream(device)
        stream.thread = threading.Thread(target=self._work, args=(stream,), name=f"fake-stream-{device}", daemon=True)
        stream.thread.start()
        self.streams.add(stream)
        return stream

    def close_stream(self, stream: FakeStream) -> None:
        self.streams.remove(stream)
        stream.tasks.put(None)
        assert stream.thread is not None
        stream.thread.join()

    def copy(self, stream: FakeStream, memory: DeviceMemory, offset_bytes: int, address: int, size_bytes: int) -> None:
        self._fail("copy")
        assert memory.device == stream.device
        assert offset_bytes >= 0
        assert offset_bytes + size_bytes <= memory.size_bytes
        ranges = self._ranges(address, size_bytes)
        if ranges and (len(ranges) > 1 or not (ranges[0][0] <= address and address + size_bytes <= sum(ranges[0]))):
            raise DeviceError("cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE")
        self.copies.append((memory.device, offset_bytes, size_bytes))
        stream.tasks.put((memory.address + offset_bytes, address, size_bytes))

    def record(self, stream: FakeStream) -> FakeEvent:
        self._fail("record")
        event = FakeEvent(stream)
        self.events.add(event)
        stream.tasks.put(event)
        return event

    def occurred(self, event: FakeEvent) -> bool:
        if not event.done.is_set():
            return False
        if event.stream.broken:
            raise DeviceError(f"cuEventQuery: {event.stream.broken}")
        return True

    def close_event(self, event: FakeEvent) -> None:
        self.events.remove(event)

    def _fail(self, call: str) -> None:
        left = self.failing.get(call, 0)
        if left:
            self.failing[call] = left - 1
            raise DeviceError(f"{call}: CUDA_ERROR_UNKNOWN")

    def _ranges(self, address: int, size_bytes: int) -> list[tuple[int, int]]:
        registered = sorted(self.registered.items())
        return [(start, size) for start, size in registered if start < address + size_bytes and address < start + size]

    def _map(self, device: int, descriptor: int, size_bytes: int) -> DeviceMemory:
        area = mmap.mmap(descriptor, size_bytes)
        memory = DeviceMemory(device, ctypes.addressof(ctypes.c_char.from_buffer(area)), size_bytes, descriptor)
        self._areas[memory.address] = descriptor, area
        self.allocations[memory.address] = memory
        return memory

    def _work(self, stream: FakeStream) -> None:
        while (task := stream.tasks.get()) is not None:
            if isinstance(task, FakeEvent):
                task.done.set()
                continue
            self.gate.wait()
            if self.slow_s:
                time.sleep(self.slow_s)
            self._copied += 1
            try:
                self.on_copy(self._copied)
            except DeviceError:
                stream.broken = "CUDA_ERROR_ILLEGAL_ADDRESS"
            if not stream.broken:
                ctypes.memmove(task[0], task[1], task[2])


def content(memory: DeviceMemory, size_bytes: int) -> bytes:
    """What lies in fake memory that is mapped."""
    return ctypes.string_at(memory.address, size_bytes)

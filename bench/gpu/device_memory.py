"""Prove, and time, what the device tier is to be built on: memory that outlives its exporter, and copies from the arena.

Run on a machine with an NVIDIA device and cuda-bindings. Prints one `name<TAB>value` line per finding; exits 1 if a proof
fails.

1. A process (the store) makes device memory with the driver's virtual memory API, fills it, exports it as a descriptor, hands
   the descriptor to a parent without any CUDA (the agent), and is killed with SIGKILL. The parent passes the descriptor to a
   third process (a worker), which imports and maps it, compares every byte, and views it as a torch tensor without a copy.
2. A memfd (the arena) is registered with CUDA, and copied to the device; beside it memory from cuMemHostAlloc, and
   pageable memory, as the bounds above and below.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import Any, ClassVar

GIB = 1 << 30


def checked(result: tuple[Any, ...]) -> Any:
    """The values of a driver call; RuntimeError with the driver's own name of the error otherwise."""
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        raise RuntimeError(name.decode())
    return values[0] if len(values) == 1 else tuple(values)


def open_device() -> Any:
    from cuda.bindings import driver

    checked(driver.cuInit(0))
    device = checked(driver.cuDeviceGet(0))
    checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(device))))
    return driver


def allocation(driver: Any) -> Any:
    prop = driver.CUmemAllocationProp()
    prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = 0
    prop.requestedHandleTypes = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return prop


def mapped(driver: Any, handle: Any, size: int) -> int:
    address = checked(driver.cuMemAddressReserve(size, 0, 0, 0))
    checked(driver.cuMemMap(address, size, 0, handle, 0))
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 0
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    checked(driver.cuMemSetAccess(address, size, [access], 1))
    return int(address)


def pattern(size: int) -> bytes:
    """4 MiB of a seeded pattern, repeated by its users; a shift or a zeroed page would show."""
    import random

    return random.Random(size).randbytes(4 << 20)


def exporter(size: int, sock: socket.socket) -> None:
    driver = open_device()
    began = time.monotonic()
    handle = checked(driver.cuMemCreate(size, allocation(driver), 0))
    address = mapped(driver, handle, size)
    created_s = time.monotonic() - began
    block = pattern(size)
    for offset in range(0, size, len(block)):
        checked(driver.cuMemcpyHtoD(address + offset, block, len(block)))
    checked(driver.cuCtxSynchronize())
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    descriptor = int(checked(driver.cuMemExportToShareableHandle(handle, kind, 0)))
    socket.send_fds(sock, [json.dumps({"created_s": created_s}).encode()], [descriptor])
    signal.pause()


def importer(size: int, sock: socket.socket) -> None:
    _, (descriptor,), _, _ = socket.recv_fds(sock, 4096, 1)
    began = time.monotonic()
    driver = open_device()
    context_s = time.monotonic() - began
    began = time.monotonic()
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    handle = checked(driver.cuMemImportFromShareableHandle(descriptor, kind))
    address = mapped(driver, handle, size)
    attach_s = time.monotonic() - began
    block = pattern(size)
    back = bytearray(len(block))
    good = True
    for offset in range(0, size, len(block)):
        checked(driver.cuMemcpyDtoH(back, address + offset, len(block)))
        good = good and back == block
    import torch

    class Image:
        __cuda_array_interface__: ClassVar = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}

    tensor = torch.as_tensor(Image(), device="cuda")
    zero_copy = tensor.data_ptr() == address
    total = int(tensor[: len(block)].to(torch.int64).sum())
    same = zero_copy and total == sum(block)
    sock.send(json.dumps({"good": good, "torch": same, "attach_s": attach_s, "context_s": context_s}).encode())


def prove_outliving(size: int) -> bool:
    def child(role: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        ours.settimeout(120)
        with theirs:
            args = [sys.executable, __file__, role, "--bytes", str(size), "--socket", str(theirs.fileno())]
            return subprocess.Popen(args, pass_fds=[theirs.fileno()]), ours

    maker, sock = child("exporter")
    data, (descriptor,), _, _ = socket.recv_fds(sock, 4096, 1)
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    report("exporter.create_and_map_s", json.loads(data)["created_s"])
    good = True
    for attempt in (1, 2):
        user, sock = child("importer")
        socket.send_fds(sock, [b"x"], [descriptor])
        answer = sock.recv(4096)
        user.wait()
        result = json.loads(answer) if answer else {"good": False, "torch": False}
        for name, value in result.items():
            report(f"importer{attempt}.{name}", value)
        good = good and result["good"] and result["torch"]
    os.close(descriptor)
    report("device_memory_outlives_its_exporter", good)
    return good


def copies(size: int) -> None:
    driver = open_device()
    device = checked(driver.cuMemAlloc(size))
    libc = ctypes.CDLL(None, use_errno=True)
    sources: list[tuple[str, int, bool]] = []
    for name, advise in (("memfd_small_pages", False), ("memfd_thp", True)):
        descriptor = os.memfd_create(name)
        os.ftruncate(descriptor, size)
        area = mmap.mmap(descriptor, size)
        if advise:
            area.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        began = time.monotonic()
        libc.memset(ctypes.c_void_p(address), 1, ctypes.c_size_t(size))
        report(f"{name}.first_touch_s", time.monotonic() - began)
        report(f"{name}.pageable_gbps", rate(driver, device, address, size))
        began = time.monotonic()
        for offset in range(0, size, GIB):
            flags = driver.CU_MEMHOSTREGISTER_PORTABLE
            checked(driver.cuMemHostRegister(address + offset, min(GIB, size - offset), flags))
        report(f"{name}.register_s_per_gib", (time.monotonic() - began) / (size / GIB))
        sources.append((name, address, True))
    pinned = int(checked(driver.cuMemHostAlloc(size, driver.CU_MEMHOSTALLOC_PORTABLE)))
    sources.append(("cuMemHostAlloc", pinned, True))
    best = 0.0
    for name, address, _ in sources:
        value = rate(driver, device, address, size)
        report(f"{name}.pinned_gbps", value)
        best = max(best, value)
    checked(driver.cuMemFree(device))
    report("best_h2d_gbps", best)


def rate(driver: Any, device: Any, address: int, size: int) -> float:
    """Median of five copies host -> device, in 1e9 bytes per second."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        for offset in range(0, size, GIB):  # one copy may not cross from one registration into the next
            checked(driver.cuMemcpyHtoDAsync(int(device) + offset, address + offset, min(GIB, size - offset), 0))
        checked(driver.cuStreamSynchronize(0))
        times.append(time.monotonic() - began)
    return size / statistics.median(times) / 1e9


def report(name: str, value: object) -> None:
    print(f"{name}\t{value:.4f}" if isinstance(value, float) else f"{name}\t{value}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["exporter", "importer"])
    parser.add_argument("--bytes", type=int, default=2 * GIB)
    parser.add_argument("--socket", type=int)
    args = parser.parse_args()
    if args.role:
        role = exporter if args.role == "exporter" else importer
        role(args.bytes, socket.socket(fileno=args.socket))
        return 0
    good = prove_outliving(args.bytes)
    copies(args.bytes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Errors of a device's driver by name, the fake driver's own rules, and CUDA's bindings where they are installed."""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import random

import pytest

from agent.native.device import DeviceError, NoDriver, checked, install_driver, loading_bindings, open_driver
from schema.errors import NotFound, OutOfSpace
from tests.agent.native.fake_driver import GRANULARITY, FakeDriver, content


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    cudaErrorInsufficientDriver = 35  # noqa: N815 - CUDA's own names
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


def test_a_call_gives_its_values() -> None:
    assert checked("cuInit", (Status.CUDA_SUCCESS,)) == ()
    assert checked("cuDeviceGetCount", (Status.CUDA_SUCCESS, 3)) == 3
    assert checked("cuMemGetInfo", (Status.CUDA_SUCCESS, 3, 4)) == (3, 4)


def test_errors_name_the_call_and_the_code() -> None:
    with pytest.raises(OutOfSpace, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        checked("cuMemCreate", (Status.CUDA_ERROR_OUT_OF_MEMORY, None))
    with pytest.raises(NoDriver, match="cudaGetDeviceCount: cudaErrorInsufficientDriver"):
        checked("cudaGetDeviceCount", (Status.cudaErrorInsufficientDriver, None))
    with pytest.raises(NotFound, match="cuInit: CUDA_ERROR_NO_DEVICE"):
        checked("cuInit", (Status.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(DeviceError, match=r"^cuEventQuery: CUDA_ERROR_ILLEGAL_ADDRESS$"):
        checked("cuEventQuery", (Status.CUDA_ERROR_ILLEGAL_ADDRESS,))


def test_missing_bindings_and_a_missing_driver_are_told_apart_from_other_failures() -> None:
    class DynamicLibNotFoundError(RuntimeError):
        pass

    def raising(error: Exception) -> None:
        raise error

    with pytest.raises(NoDriver, match="bindings are not installed"):
        loading_bindings(lambda: raising(ImportError("No module named 'cuda'")))
    with pytest.raises(NoDriver, match="no NVIDIA driver"):
        loading_bindings(lambda: raising(DynamicLibNotFoundError("cuda")))
    with pytest.raises(RuntimeError, match="something else"):
        loading_bindings(lambda: raising(RuntimeError("something else")))
    assert loading_bindings(lambda: 5) == 5


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is an NVIDIA driver here")  # noqa: PTH110
def test_without_a_driver_opening_one_says_so() -> None:
    with pytest.raises(NoDriver, match="cpu"):
        open_driver()


def test_another_driver_can_be_installed() -> None:
    from agent.native import device

    driver, before = FakeDriver(), device._maker
    try:
        install_driver(lambda: driver)
        assert open_driver() is driver
    finally:
        install_driver(before)


def test_fake_memory_outlives_its_maker_and_counts_until_nobody_holds_it() -> None:
    maker, user = FakeDriver((GRANULARITY,)), FakeDriver()
    memory = maker.allocate(0, 5000)
    assert memory.size_bytes == GRANULARITY
    data = random.Random(1).randbytes(5000)
    ctypes.memmove(memory.address, data, len(data))
    descriptor = maker.export(memory)
    maker.free(memory)
    with pytest.raises(OutOfSpace):
        maker.allocate(0, 1)
    mapped = user.attach(0, descriptor, memory.size_bytes)
    os.close(descriptor)
    assert content(mapped, 5000) == data
    with pytest.raises(OutOfSpace):
        maker.allocate(0, 1)
    user.free(mapped)
    maker.free(maker.allocate(0, 1))
    assert not maker.leaked | user.leaked


def test_fake_copies_are_ordered_asynchronous_and_keep_to_registrations() -> None:
    driver = FakeDriver()
    area = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area[:] = os.urandom(len(area))
    driver.register(address, 2 * mmap.PAGESIZE)
    driver.register(address + 2 * mmap.PAGESIZE, 2 * mmap.PAGESIZE)
    memory, stream = driver.allocate(0, 1 << 20), driver.stream(0)
    with pytest.raises(DeviceError):
        driver.copy(stream, memory, 0, address, 3 * mmap.PAGESIZE)
    driver.gate.clear()
    driver.copy(stream, memory, 0, address, 2 * mmap.PAGESIZE)
    event = driver.record(stream)
    assert not driver.occurred(event)
    driver.gate.set()
    assert event.done.wait(60)
    assert driver.occurred(event)
    assert content(memory, 2 * mmap.PAGESIZE) == area[: 2 * mmap.PAGESIZE]
    driver.close_event(event)
    driver.close_stream(stream)
    driver.free(memory)
    assert not driver.leaked

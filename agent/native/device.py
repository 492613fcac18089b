"""What store and workers want of a device: memory that outlives its maker, copies that nobody waits for, clear errors.

One interface, `Driver`, with one implementation in the product (`agent.native.cuda`). Everything above it is tested over a fake
one. A driver is made in the process that uses it, never before a fork.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from schema.errors import NotFound, OutOfSpace, SllmError

__all__ = [
    "DLPACK_CPU",
    "DLPACK_CUDA",
    "DeviceError",
    "DeviceMemory",
    "DeviceProperties",
    "Driver",
    "NoDriver",
    "budget_bytes",
    "checked",
    "find_devices",
    "install_driver",
    "loading_bindings",
    "open_driver",
]

DLPACK_CPU: Final = 1
DLPACK_CUDA: Final = 2

_OUT_OF_MEMORY: Final = frozenset({"CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation"})
_NO_DRIVER: Final = frozenset(
    {
        "CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "cudaErrorNoDevice", "cudaErrorStubLibrary", "cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch",
    }
)  # fmt: skip
_log = logging.getLogger(__name__)


class NoDriver(NotFound):
    """This machine has no device that the driver knows, or no driver, or no bindings to speak to it."""


class DeviceError(SllmError):
    """A call of a device's driver failed; the message names the call and the driver's own word for the error."""


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """A device as its driver describes it; ``index`` is how it is named everywhere else."""

    index: int
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, mapped for this process at ``address``. ``size_bytes`` is rounded up as the device wants it."""

    device: int
    address: int
    size_bytes: int
    handle: Any


class Driver(Protocol):
    """The calls of a device's driver. Any thread may call; none of them waits for a copy.

    Every call raises DeviceError when the driver refuses, `allocate` and `attach` OutOfSpace when the device is full. Streams
    and events are opaque.
    """

    dlpack_type: int
    """The device type of `DeviceMemory` in DLPack's numbering."""

    def devices(self) -> tuple[DeviceProperties, ...]: ...

    def torch_device(self, device: int) -> str:
        """The device's name for torch."""

    def allocate(self, device: int, size_bytes: int) -> DeviceMemory:
        """Fresh memory, of any content."""

    def export(self, memory: DeviceMemory) -> int:
        """A descriptor that keeps the memory alive and that another process can attach. The caller owns it."""

    def attach(self, device: int, descriptor: int, size_bytes: int) -> DeviceMemory:
        """Memory that another process allocated with this size; the descriptor stays the caller's."""

    def free(self, memory: DeviceMemory) -> None:
        """Unmap; the memory itself is free when no other process and no descriptor holds it."""

    def register(self, address: int, size_bytes: int) -> None:
        """Pin whole pages of this process's memory, for all devices, so that they are copied from at full speed."""

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that begins at ``address``."""

    def stream(self, device: int) -> Any:
        """A queue of copies, done in order."""

    def close_stream(self, stream: Any) -> None: ...

    def copy(self, stream: Any, memory: DeviceMemory, offset_bytes: int, address: int, size_bytes: int) -> None:
        """Queue a copy from this process's memory. One copy must not cross from one registered range into another."""

    def record(self, stream: Any) -> Any:
        """An event that occurs when everything queued so far is done."""

    def occurred(self, event: Any) -> bool:
        """True once the event has occurred. Raises DeviceError when a copy before it failed."""

    def close_event(self, event: Any) -> None: ...


def checked(call: str, result: tuple[Any, ...]) -> Any:
    """The values of a call of CUDA's driver or runtime API, whose bindings return (status, values...).

    Raises NoDriver, OutOfSpace or DeviceError by the status's name.
    """
    status, *values = result
    if int(status) != 0:
        name = str(getattr(status, "name", status))
        if name in _NO_DRIVER:
            raise NoDriver(f"{call}: {name}; install an NVIDIA driver that fits this machine, or set devices to cpu")
        if name in _OUT_OF_MEMORY:
            raise OutOfSpace(f"{call}: {name}; the device has no memory left")
        raise DeviceError(f"{call}: {name}")
    return values[0] if len(values) == 1 else tuple(values)


def loading_bindings(load: Callable[[], Any]) -> Any:
    """What ``load`` returns, which is the first to touch the bindings. Raises NoDriver without bindings or a driver library."""
    try:
        return load()
    except ImportError as error:
        raise NoDriver(
            f"the CUDA bindings are not installed ({error}); install sllmctl[cuda], or set devices to cpu"
        ) from error
    except RuntimeError as error:  # the bindings' own class, known only where they are installed
        if type(error).__name__ != "DynamicLibNotFoundError":
            raise
        raise NoDriver("there is no NVIDIA driver on this machine; install one, or set devices to cpu") from error


def _cuda() -> Driver:
    driver: Driver = importlib.import_module("agent.native.cuda").CudaDriver()
    return driver


_maker: Callable[[], Driver] = _cuda


def open_driver() -> Driver:
    """The driver of this machine's devices. Raises NoDriver where there are none, DeviceError when it does not work."""
    return _maker()


def find_devices(setting: str) -> tuple[Driver | None, tuple[DeviceProperties, ...]]:
    """The driver and devices that a node's ``devices`` setting asks for: none on "cpu", what there is on "auto".

    Raises NoDriver or DeviceError on "cuda" when there is no working one; "auto" goes on without, and says why in the log.
    """
    if setting == "cpu":
        return None, ()
    try:
        driver = open_driver()
        found = driver.devices()
        if not found:
            raise NoDriver("the driver knows no device; set devices to cpu")
    except NoDriver:
        if setting == "auto":
            return None, ()
        raise
    except DeviceError as error:
        if setting != "auto":
            raise
        _log.warning("the devices of this node are not used: %s", error)
        return None, ()
    return driver, found


def budget_bytes(device_bytes: int, device: DeviceProperties) -> int:
    """What weights and KV caches may take of a device: as set, else nine tenths; the rest is for contexts and work."""
    whole = device.memory_bytes
    return min(device_bytes, whole) if device_bytes else whole // 10 * 9


def install_driver(maker: Callable[[], Driver]) -> None:
    """Let `open_driver` of this process make another driver than CUDA's."""
    global _maker
    _maker = maker

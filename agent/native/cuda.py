"""CUDA's driver API behind `agent.native.device.Driver`: a call or two per method, and no decision.

The calls are those that bench/gpu/device_memory.py proves on a device: memory from the virtual memory API, exported as a POSIX
descriptor; host memory registered portable; asynchronous copies. Contexts are the devices' primary ones, which torch uses too.
"""

from __future__ import annotations

import importlib
from typing import Any

from agent.native.device import DLPACK_CUDA, DeviceMemory, DeviceProperties, checked, loading_bindings

__all__ = ["CudaDriver"]


class CudaDriver:
    """A `Driver` over ``cuda.bindings``. Raises NoDriver where there is no device to speak to."""

    dlpack_type = DLPACK_CUDA

    def __init__(self) -> None:
        self._api: Any = loading_bindings(_load)
        self._contexts: dict[int, Any] = {}

    def devices(self) -> tuple[DeviceProperties, ...]:
        api = self._api
        found = []
        for index in range(checked("cuDeviceGetCount", api.cuDeviceGetCount())):
            device = checked("cuDeviceGet", api.cuDeviceGet(index))
            name = checked("cuDeviceGetName", api.cuDeviceGetName(256, device))
            memory_bytes = checked("cuDeviceTotalMem", api.cuDeviceTotalMem(device))
            found.append(DeviceProperties(index, name.split(b"\0")[0].decode("ascii", "replace"), int(memory_bytes)))
        return tuple(found)

    def torch_device(self, device: int) -> str:
        return f"cuda:{device}"

    def allocate(self, device: int, size_bytes: int) -> DeviceMemory:
        api = self._api
        self._enter(device)
        prop = self._prop(device)
        least = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(checked("cuMemGetAllocationGranularity", api.cuMemGetAllocationGranularity(prop, least)))
        size_bytes = -(-size_bytes // granularity) * granularity
        return self._map(device, checked("cuMemCreate", api.cuMemCreate(size_bytes, prop, 0)), size_bytes)

    def export(self, memory: DeviceMemory) -> int:
        self._enter(memory.device)
        result = self._api.cuMemExportToShareableHandle(memory.handle, self._descriptor_type, 0)
        return int(checked("cuMemExportToShareableHandle", result))

    def attach(self, device: int, descriptor: int, size_bytes: int) -> DeviceMemory:
        self._enter(device)
        result = self._api.cuMemImportFromShareableHandle(descriptor, self._descriptor_type)
        return self._map(device, checked("cuMemImportFromShareableHandle", result), size_bytes)

    def free(self, memory: DeviceMemory) -> None:
        api = self._api
        self._enter(memory.device)
        checked("cuMemUnmap", api.cuMemUnmap(memory.address, memory.size_bytes))
        checked("cuMemAddressFree", api.cuMemAddressFree(memory.address, memory.size_bytes))
        checked("cuMemRelease", api.cuMemRelease(memory.handle))

    def register(self, address: int, size_bytes: int) -> None:
        self._enter(0)
        result = self._api.cuMemHostRegister(address, size_bytes, self._api.CU_MEMHOSTREGISTER_PORTABLE)
        checked("cuMemHostRegister", result)

    def unregister(self, address: int) -> None:
        self._enter(0)
        checked("cuMemHostUnregister", self._api.cuMemHostUnregister(address))

    def stream(self, device: int) -> Any:
        self._enter(device)
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return device, checked("cuStreamCreate", self._api.cuStreamCreate(flags))

    def close_stream(self, stream: Any) -> None:
        device, handle = stream
        self._enter(device)
        checked("cuStreamDestroy", self._api.cuStreamDestroy(handle))

    def copy(self, stream: Any, memory: DeviceMemory, offset_bytes: int, address: int, size_bytes: int) -> None:
        device, handle = stream
        self._enter(device)
        result = self._api.cuMemcpyHtoDAsync(memory.address + offset_bytes, address, size_bytes, handle)
        checked("cuMemcpyHtoDAsync", result)

    def record(self, stream: Any) -> Any:
        api = self._api
        device, handle = stream
        self._enter(device)
        event = checked("cuEventCreate", api.cuEventCreate(api.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        try:
            checked("cuEventRecord", api.cuEventRecord(event, handle))
        except BaseException:
            api.cuEventDestroy(event)
            raise
        return device, event

    def occurred(self, event: Any) -> bool:
        device, handle = event
        self._enter(device)
        status = self._api.cuEventQuery(handle)[0]
        if status == self._api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        checked("cuEventQuery", (status,))
        return True

    def close_event(self, event: Any) -> None:
        device, handle = event
        self._enter(device)
        checked("cuEventDestroy", self._api.cuEventDestroy(handle))

    @property
    def _descriptor_type(self) -> Any:
        return self._api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _enter(self, device: int) -> None:
        """Make the device's primary context the calling thread's."""
        api = self._api
        if device not in self._contexts:
            handle = checked("cuDeviceGet", api.cuDeviceGet(device))
            self._contexts[device] = checked("cuDevicePrimaryCtxRetain", api.cuDevicePrimaryCtxRetain(handle))
        checked("cuCtxSetCurrent", api.cuCtxSetCurrent(self._contexts[device]))

    def _prop(self, device: int) -> Any:
        api = self._api
        prop = api.CUmemAllocationProp()
        prop.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = device
        prop.requestedHandleTypes = self._descriptor_type
        return prop

    def _map(self, device: int, handle: Any, size_bytes: int) -> DeviceMemory:
        """Give a handle an address; on failure nothing of it is left, the handle included."""
        api = self._api
        address = mapped = 0
        try:
            address = int(checked("cuMemAddressReserve", api.cuMemAddressReserve(size_bytes, 0, 0, 0)))
            checked("cuMemMap", api.cuMemMap(address, size_bytes, 0, handle, 0))
            mapped = size_bytes
            access = api.CUmemAccessDesc()
            access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = device
            access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            checked("cuMemSetAccess", api.cuMemSetAccess(address, size_bytes, [access], 1))
        except BaseException:
            if mapped:
                api.cuMemUnmap(address, size_bytes)
            if address:
                api.cuMemAddressFree(address, size_bytes)
            api.cuMemRelease(handle)
            raise
        return DeviceMemory(device, address, size_bytes, handle)


def _load() -> Any:
    driver = importlib.import_module("cuda.bindings.driver")
    checked("cuInit", driver.cuInit(0))
    return driver

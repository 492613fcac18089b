"""Memory as a DLPack tensor of bytes, which frees it when the last tensor over it has gone (DLPack 0.8, dlpack.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

__all__ = ["bytes_capsule"]

_UINT: Final = 1
_NAME: Final = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_alive: Final[dict[int, tuple[_Managed, Any, Callable[[], None]]]] = {}
"""What a consumer may still read, and what is called at the end, by the address that it was given."""


def _delete(managed: int) -> None:
    found = _alive.pop(managed, None)
    if found is not None:
        found[2]()


_deleter: Final = _Deleter(_delete)
"""One for all: a callback must not go away while it is being called."""


def bytes_capsule(address: int, size_bytes: int, device_type: int, device: int, freed: Callable[[], None]) -> Any:
    """A capsule for ``from_dlpack``, which must consume it. ``freed`` is called once, when nothing uses the memory any more."""
    shape = (ctypes.c_int64 * 1)(size_bytes)
    made = _Managed()
    made.tensor = _Tensor(address, device_type, device, 1, _UINT, 8, 1, shape, None, 0)
    made.deleter = _deleter
    at = ctypes.addressof(made)
    _alive[at] = made, shape, freed
    return _new_capsule(at, _NAME, None)

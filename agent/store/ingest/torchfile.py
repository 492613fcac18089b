"""Where the tensors of a torch.save file lie, found without torch: the zip format since torch 1.6, and the one before it.

A zip has ``NAME/data.pkl`` and one entry, never compressed, for each storage: ``NAME/data/KEY``. The old format is five pickles
(magic number, version, system, the object, the storages' keys), then each storage behind its count of elements. Both hold
tensors as views of storages. https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Final

from agent.store.ingest.unpickle import MAX_PICKLE_BYTES, PickledTensor, Storage, load
from schema.checkpoint import DTYPE_BYTES, tensor_bytes
from schema.errors import InvalidCheckpoint

__all__ = ["FoundTensor", "find_tensors"]

_MAX_DIRECTORY_BYTES: Final = 64 << 20
_MAX_DIMENSIONS: Final = 16
_MAX_NAME: Final = 1024
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAGIC: Final = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor: ``offset_bytes`` from the file's beginning; ``strides`` in elements, None where its bytes are adjacent."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    strides: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Extent:
    offset_bytes: int
    size_bytes: int


def find_tensors(descriptor: int, file: str, size: int) -> list[FoundTensor]:
    """The tensors of a torch.save file of ``size`` bytes, a state dict of nothing but tensors, names in its order.

    Raises InvalidCheckpoint naming ``file`` for what is damaged, hostile, compressed or of a kind that is not read here.
    """
    head = os.pread(descriptor, 4, 0)
    value, storages = (_read_zip if head == b"PK\x03\x04" else _read_old)(descriptor, file, size)
    if type(value) is not dict:
        raise InvalidCheckpoint(f"{file} holds no state dict of names to tensors")
    found = [_place(name, tensor, storages, file) for name, tensor in value.items()]
    claimed = sum(tensor.size_bytes for tensor in found)
    if claimed > 2 * size:  # tied tensors are twice there by name
        raise InvalidCheckpoint(f"{file}: its tensors claim {claimed} bytes, the file has {size}")
    return found


def _place(name: Any, tensor: Any, storages: dict[str, _Extent], file: str) -> FoundTensor:
    if type(name) is not str or not name or len(name) > _MAX_NAME or not name.isprintable():
        raise InvalidCheckpoint(f"{file} has a tensor whose name is none, empty, too long or not printable")
    where = f"{file}: tensor {name[:80]!r}"
    if type(tensor) is not PickledTensor:
        raise InvalidCheckpoint(f"{where} is no tensor; only a state dict of tensors alone is read, no trainer's checkpoint")
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    extent = storages.get(storage.key)
    if extent is None:
        raise InvalidCheckpoint(f"{where}: its storage {storage.key[:80]!r} is not in the file")
    item = DTYPE_BYTES[tensor.dtype]
    if storage.count * DTYPE_BYTES[storage.dtype] != extent.size_bytes:
        raise InvalidCheckpoint(f"{where}: its storage has {extent.size_bytes} bytes, not {storage.count} of {storage.dtype}")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidCheckpoint(f"{where} has no valid shape")
    size = tensor_bytes(tensor.dtype, shape)
    if size is None or size > extent.size_bytes:
        raise InvalidCheckpoint(
            f"{where}: {shape} of {tensor.dtype} repeats bytes of its storage, which has {extent.size_bytes}"
        )
    last = tensor.offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) if size else 0
    if size and (last + 1) * item > extent.size_bytes:
        raise InvalidCheckpoint(f"{where} reaches beyond its storage of {extent.size_bytes} bytes")
    adjacent = not size or all(
        count == 1 or stride == prod(shape[axis + 1 :]) for axis, (count, stride) in enumerate(zip(shape, strides, strict=True))
    )
    start = extent.offset_bytes + (tensor.offset * item if size else 0)
    return FoundTensor(name, tensor.dtype, shape, start, size, None if adjacent else strides)


def _read_zip(descriptor: int, file: str, size: int) -> tuple[Any, dict[str, _Extent]]:
    try:
        entries = dict(_entries(descriptor, file, size))
    except (struct.error, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(f"{file} is truncated or damaged: its zip directory cannot be read") from error
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InvalidCheckpoint(f"{file} is a zip file, but none of torch.save's: it has {len(pickles)} data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _read(descriptor, order, file, 16) != b"little":
        raise InvalidCheckpoint(f"{file} was written on a machine of another byte order")
    pickle = _read(descriptor, entries[pickles[0]], file, MAX_PICKLE_BYTES)
    value, _ = load(memoryview(pickle), f"{file}: its pickle")
    prefix = f"{root}data/"
    return value, {name.removeprefix(prefix): extent for name, extent in entries.items() if name.startswith(prefix)}


def _entries(descriptor: int, file: str, size: int) -> Iterator[tuple[str, _Extent]]:
    """The entries of a zip, none of them compressed and no two on the same bytes. The format: PKWARE's APPNOTE.TXT 6.3."""
    count, length, start = _directory(descriptor, file, size)
    if length > _MAX_DIRECTORY_BYTES or start + length > size or count * _ENTRY.size > length:
        raise InvalidCheckpoint(f"{file} is truncated or damaged: its zip directory does not lie in it")
    directory = memoryview(os.pread(descriptor, length, start))
    at, names, extents = 0, set(), []
    for _ in range(count):
        magic, _, _, flags, method, _, _, _, packed, plain, *lengths, _, _, _, local = _ENTRY.unpack_from(directory, at)
        name_length, extra_length, comment_length = lengths
        at += _ENTRY.size
        name = bytes(directory[at : at + name_length]).decode()
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or name in names:
            raise InvalidCheckpoint(f"{file} is damaged: its zip directory has an entry that is none, or twice there")
        names.add(name)
        plain, packed, local = _wide(extra, plain, packed, local)
        if method or flags & 1 or packed != plain:
            raise InvalidCheckpoint(f"{file}: {name[:80]} in it is compressed or encrypted, as torch.save never writes it")
        header = os.pread(descriptor, _LOCAL.size, local) if local <= size else b""
        fields = _LOCAL.unpack(header)
        begin = local + _LOCAL.size + fields[9] + fields[10]
        if fields[0] != b"PK\x03\x04" or begin + plain > start:
            raise InvalidCheckpoint(f"{file} is truncated or damaged: {name[:80]} does not lie in it")
        extents.append((local, begin + plain))
        yield name, _Extent(begin, plain)
    extents.sort()
    if any(one[1] > other[0] for one, other in pairwise(extents)):
        raise InvalidCheckpoint(f"{file}: two entries of the zip lie on the same bytes")


def _directory(descriptor: int, file: str, size: int) -> tuple[int, int, int]:
    """Count of entries, length and start of the directory, from the record at the end."""
    tail_start = max(0, size - _END.size - 0xFFFF)
    tail = os.pread(descriptor, size - tail_start, tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise InvalidCheckpoint(f"{file} is truncated: it begins like a zip file of torch.save, but has no zip directory")
    _, _, _, _, count, length, start, _ = _END.unpack_from(tail, at)
    locator = tail_start + at - _LOCATOR.size
    if locator >= 0:
        magic, _, record, _ = _LOCATOR.unpack(os.pread(descriptor, _LOCATOR.size, locator))
        if magic == b"PK\x06\x07" and record <= size:
            wide = _END64.unpack(os.pread(descriptor, _END64.size, record))
            if wide[0] == b"PK\x06\x06":
                return wide[7], wide[8], wide[9]
    return count, length, start


def _wide(extra: memoryview, *values: int) -> tuple[int, ...]:
    """Sizes and offset, where they are too large for 32 bits, from the extra field for them."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return tuple(next(numbers, value) if value == 0xFFFFFFFF else value for value in values)
        at += 4 + length
    return values


def _read_old(descriptor: int, file: str, size: int) -> tuple[Any, dict[str, _Extent]]:
    data = memoryview(os.pread(descriptor, min(size, 2 * MAX_PICKLE_BYTES), 0))
    values = []
    at = 0
    for part in ("magic number", "version", "system", "pickle", "list of storages"):
        value, length = load(data[at:], f"{file}: its {part}")
        at += length
        values.append(value)
        if len(values) == 1 and value != _MAGIC:
            raise InvalidCheckpoint(f"{file} is no file of torch.save: it does not begin as one")
    _, version, system, value, keys = values
    if version != 1001 or type(system) is not dict or system.get("little_endian") is not True:
        raise InvalidCheckpoint(f"{file} is of a version or byte order that is not read here")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise InvalidCheckpoint(f"{file} has no list of storages")
    return value, _old_storages(descriptor, file, size, at, keys, value)


def _old_storages(descriptor: int, file: str, size: int, at: int, keys: list[str], value: Any) -> dict[str, _Extent]:
    named: dict[str, Storage] = {}
    for tensor in value.values() if type(value) is dict else ():
        if type(tensor) is PickledTensor:
            named[tensor.storage.key] = tensor.storage
    storages: dict[str, _Extent] = {}
    for key in keys:
        header = os.pread(descriptor, 8, at)
        count = int.from_bytes(header, "little")
        storage = named.get(key)
        if storage is None or key in storages:
            raise InvalidCheckpoint(f"{file} has a storage that belongs to no tensor, or is there twice")
        length = count * DTYPE_BYTES[storage.dtype]
        if len(header) < 8 or count != storage.count or at + 8 + length > size:
            raise InvalidCheckpoint(f"{file} is truncated or damaged: the storage at byte {at} does not lie in it")
        storages[key] = _Extent(at + 8, length)
        at += 8 + length
    return storages


def _read(descriptor: int, extent: _Extent, file: str, limit: int) -> bytes:
    if extent.size_bytes > limit:
        raise InvalidCheckpoint(f"{file}: a pickle of {extent.size_bytes} bytes; at most {limit} are read")
    return os.pread(descriptor, extent.size_bytes, extent.offset_bytes)

"""Finds the tensors of a model's weight files, believing nothing: safetensors, or what torch.save wrote where there are none.

The format: https://github.com/huggingface/safetensors#format. As there, the tensors must cover the data without holes.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Any, Final

from agent.store.ingest.files import SourceDirectory
from agent.store.ingest.reading import SourceReader
from agent.store.ingest.strided import gather
from agent.store.ingest.torchfile import find_tensors
from schema.checkpoint import DTYPE_BITS, DTYPE_BYTES, tensor_bytes
from schema.errors import InvalidCheckpoint

__all__ = ["SourceTensor", "Sources", "parse_json"]

_MAX_HEADER_BYTES: Final = 64 << 20
_MAX_DIMENSIONS: Final = 16
_MAX_NAME: Final = 1024
_MAX_COUNT: Final = 1 << 50
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
_PICKLED_SINGLE: Final = "pytorch_model.bin"
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor in a source file: ``offset_bytes`` from the file's beginning.

    ``strides``, in elements, of a view whose bytes do not follow each other, as a pickled file may have them. ``parts``: its
    bytes are theirs, one after the other, and ``offset_bytes`` says nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    size_bytes: int
    strides: tuple[int, ...] | None = None
    parts: tuple[SourceTensor, ...] = ()


class Sources:
    """The weight files of a model directory, held open from the first look to the last byte. A context manager.

    ``pickled``: they are files of torch.save, of which only the tensors are read and nothing is run.
    """

    def __init__(self, directory: SourceDirectory) -> None:
        self.tensors: dict[str, SourceTensor] = {}
        self.pickled = False
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._readers: dict[str, SourceReader] = {}
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def opened(self, file: str) -> tuple[str, int, SourceReader]:
        """The path of a weight file, free of links, its descriptor, and what reads it."""
        return os.path.realpath(self._directory.path / file), self._descriptors[file], self._readers[file]

    def identities(self) -> list[tuple[str | int, ...]]:
        """Which files these are, as far as can be told without reading them: name, size, time and inode of each."""
        found: list[tuple[str | int, ...]] = []
        for file, descriptor in sorted(self._descriptors.items()):
            status = os.fstat(descriptor)
            found.append((file, status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino))
        return found

    def read(self, tensor: SourceTensor, start: int, size: int) -> bytes:
        """``size`` bytes of a tensor from ``start``. Raises InvalidCheckpoint when the file has become shorter."""
        data = bytearray(size)
        self.read_into(tensor, start, memoryview(data))
        return bytes(data)

    def read_into(self, tensor: SourceTensor, start: int, target: memoryview) -> None:
        """Fill ``target`` with a tensor's bytes from ``start``, on any thread. Raises as `read` does.

        Of a view with strides both ends lie between elements.
        """
        for part in tensor.parts:
            if start < part.size_bytes and target:
                size = min(len(target), part.size_bytes - start)
                self.read_into(part, start, target[:size])
                target, start = target[size:], start + size
            start -= part.size_bytes
        if tensor.parts:
            return
        if tensor.strides is None:
            self._read_at(tensor.file, tensor.offset_bytes + start, target)
            return
        item = DTYPE_BYTES[tensor.dtype]
        target[:] = gather(
            lambda at, memory: self._read_at(tensor.file, at, memory),
            tensor.offset_bytes, item, tensor.shape, tensor.strides, start // item, len(target) // item,
        )  # fmt: skip

    def _read_at(self, file: str, at: int, target: memoryview) -> None:
        count = self._readers[file].read_into(at, target)
        if count < len(target):
            raise InvalidCheckpoint(f"{self._directory.path / file} ended at byte {at + count} while it was read")

    def _load(self) -> None:
        if self._directory.has(_INDEX):
            self._load_sharded(_INDEX)
        elif self._directory.has(_SINGLE):
            self._add(_SINGLE)
        else:
            self.pickled = True
            if self._directory.has(_PICKLED_INDEX):
                self._load_sharded(_PICKLED_INDEX)
            elif self._directory.has(_PICKLED_SINGLE):
                self._add(_PICKLED_SINGLE)
            else:
                raise _no_weights(self._directory)
        if not self.tensors:
            raise InvalidCheckpoint(f"{self._directory.path} holds no tensors")

    def _load_sharded(self, index: str) -> None:
        placed = _weight_map(self._directory, index)
        for file in sorted(set(placed.values())):
            self._add(file)
        for name, file in placed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise InvalidCheckpoint(f"{index} says that {name!r} is in {file}; it is not")
        if extra := sorted(set(self.tensors) - set(placed)):
            raise InvalidCheckpoint(f"{self.tensors[extra[0]].file} holds {extra[0]!r}, which {index} does not list")

    def _add(self, file: str) -> None:
        descriptor, size = self._directory.open(file)
        self._descriptors[file] = descriptor
        os.set_blocking(descriptor, True)
        self._readers[file] = SourceReader(descriptor)
        for tensor in (_read_pickled if self.pickled else _read_header)(descriptor, file, size):
            if tensor.name in self.tensors:
                raise InvalidCheckpoint(f"tensor {tensor.name!r} is in {self.tensors[tensor.name].file} and in {file}")
            self.tensors[tensor.name] = tensor


def _no_weights(directory: SourceDirectory) -> InvalidCheckpoint:
    """Often an index was not downloaded with its files, or the weights are of another kind."""
    text = f"{directory.path} cannot be ingested: it has none of {_SINGLE}, {_INDEX}, {_PICKLED_SINGLE} and {_PICKLED_INDEX}"
    others = [name for name in directory.names() if name.endswith(_WEIGHTS)]
    if others:
        text += f", and nothing says how to read {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
    return InvalidCheckpoint(text)


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys. Raises InvalidCheckpoint naming ``what`` for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=_refuse_constant)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # raises for half a character, which could not be written down
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{what} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{what} is no JSON object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _weight_map(directory: SourceDirectory, index: str) -> dict[str, str]:
    placed = parse_json(directory.read(index, _MAX_HEADER_BYTES), index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise InvalidCheckpoint(f"{index} has no weight_map of names to files")
    return placed


def _read_pickled(descriptor: int, file: str, size: int) -> list[SourceTensor]:
    return [
        SourceTensor(each.name, each.dtype, each.shape, file, each.offset_bytes, each.size_bytes, each.strides)
        for each in find_tensors(descriptor, file, size)
    ]


def _read_header(descriptor: int, file: str, size: int) -> list[SourceTensor]:
    if size < 8:
        raise InvalidCheckpoint(f"{file} has {size} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise InvalidCheckpoint(
            f"{file} announces a header of {length} bytes; the file has {size}, a header at most {_MAX_HEADER_BYTES}"
        )
    header = parse_json(os.pread(descriptor, length, 8), f"the header of {file}")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = [_tensor(name, entry, file, base) for name, entry in header.items()]
    _check_cover(sorted(tensors, key=lambda each: (each.offset_bytes, each.size_bytes)), file, base, size)
    return tensors


def _tensor(name: str, entry: Any, file: str, base: int) -> SourceTensor:
    where = f"{file}: tensor {name[:80]!r}"
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise InvalidCheckpoint(f"{where} has a name that is empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InvalidCheckpoint(f"{where} has the dtype {dtype!r}, which is not known here")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise InvalidCheckpoint(f"{where} has no valid shape")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidCheckpoint(f"{where} has no valid data_offsets")
    size = offsets[1] - offsets[0]
    if tensor_bytes(dtype, shape) != size:
        raise InvalidCheckpoint(f"{where}: shape {shape} of {dtype} does not make {size} bytes")
    return SourceTensor(name, dtype, tuple(shape), file, base + offsets[0], size)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < _MAX_COUNT for each in value)


def _check_cover(tensors: list[SourceTensor], file: str, base: int, size: int) -> None:
    end = base
    for tensor in tensors:
        if tensor.offset_bytes < end:
            raise InvalidCheckpoint(f"{file}: tensor {tensor.name!r} overlaps the one before it")
        if tensor.offset_bytes > end:
            raise InvalidCheckpoint(
                f"{file}: {tensor.offset_bytes - end} bytes before tensor {tensor.name!r} belong to nothing"
            )
        end += tensor.size_bytes
    if end != size:
        fault = "is truncated" if end > size else "has bytes that belong to nothing"
        raise InvalidCheckpoint(f"{file} {fault}: its tensors end at byte {end}, the file at {size}")

"""A pickle of tensors, read without running anything: an interpreter of the few opcodes that torch.save writes for them.

Nothing is imported, looked up or called. What a pickle names stays a name; only the functions that rebuild a tensor mean
something, and they make a `PickledTensor`, which says where its bytes are. The opcodes: Lib/pickletools.py of CPython.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from schema.errors import InvalidCheckpoint

__all__ = ["MAX_PICKLE_BYTES", "PickledTensor", "Storage", "load"]

MAX_PICKLE_BYTES: Final = 32 << 20
"""A checkpoint of 100,000 tensors has less."""
_MAX_STEPS: Final = 4_000_000
_MAX_NAME: Final = 256

_STORAGES: Final = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
_DTYPES: Final = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a file by their ``key``: ``count`` elements of ``dtype``, of which the pickle alone knows."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage; offset and strides in elements of ``dtype``. Nothing of it has been held against the storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Mark:
    pass


_MARK: Final = _Mark()


def load(data: memoryview, what: str) -> tuple[Any, int]:
    """What a pickle holds, and where in ``data`` it ends; ``what`` names it in errors.

    Dicts, lists, tuples, strings, numbers and `PickledTensor` are all that comes out. Raises InvalidCheckpoint for a damaged
    pickle, and for one that asks for anything else, which is named.
    """
    machine = _Machine(data, what)
    try:
        return machine.run(), machine.at
    except (IndexError, struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
        raise InvalidCheckpoint(f"{what} is damaged near byte {machine.at}") from error


class _Machine:
    def __init__(self, data: memoryview, what: str) -> None:
        self.at = 0
        self._data = data
        self._what = what
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            code = self._data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                (value,) = self._stack
                return value
            step = _STEPS.get(code)
            if step is None:
                raise self._refused(f"uses {_opcode(code)}, which is not needed for tensors")
            step(self)
        raise self._refused(f"takes more than {_MAX_STEPS} steps to read")

    def _refused(self, why: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._what} {why}; convert it to safetensors if you trust it")

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[self.at : self.at + size])
        if len(data) < size:
            raise IndexError
        self.at += size
        return data

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _line(self) -> str:
        data = bytes(self._data[self.at : self.at + _MAX_NAME])
        line = data[: data.index(b"\n")]
        self.at += len(line) + 1
        return line.decode("ascii")

    def push(self, form: str) -> None:
        self._stack.append(self._number(form))

    def push_new(self, make: Callable[[], Any]) -> None:
        self._stack.append(make())

    def skip(self, size: int) -> None:
        self._take(size)

    def text(self, form: str) -> None:
        self._stack.append(self._take(self._number(form)).decode())

    def long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def name(self) -> None:
        self._stack.append(_Name(self._line(), self._line()))

    def name_of_texts(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        for each in (module, name):
            if type(each) is not str or len(each) > _MAX_NAME or not each.isprintable():
                raise ValueError
        self._stack.append(_Name(module, name))

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, form: str) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def get(self, form: str) -> None:
        self._stack.append(self._memo[self._number(form)])

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._stack.append(values)

    def since_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def marked_tuple(self) -> None:
        self._stack.append(tuple(self.since_mark()))

    def set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        # Keys are compared by content: only such as do so at once, and never nested ones.
        if type(target) is not dict or len(values) % 2 or not all(type(key) in (str, int) for key in values[::2]):
            raise ValueError
        target.update(zip(values[::2], values[1::2], strict=True))

    def set_item(self) -> None:
        values = self._stack[-2:]
        del self._stack[-2:]
        self.set_items(values)

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError
        target.extend(values)

    def build(self) -> None:
        self._stack.pop()  # attributes of a dict, such as a state dict's _metadata
        if type(self._stack[-1]) is not dict:
            raise self._refused("sets the attributes of something that is no dict")

    def persistent(self) -> None:
        """A storage: ('storage', its type, its key, where it was, its elements, and in the old format a view of another)."""
        value = self._stack.pop()
        if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
            raise self._refused("refers to something outside of it that is no storage")
        kind, key, count = value[1], value[2], value[4]
        if type(kind) is not _Name or kind.module not in ("torch", "torch.storage") or kind.name not in _STORAGES:
            raise self._refused(f"has a storage of the type {_shown(kind)}, which is not known here")
        if len(value) == 6 and value[5] is not None:
            raise self._refused("has a storage that is a view of another, as torch before 0.4 wrote them")
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError
        self._stack.append(Storage(key, _STORAGES[kind.name], count))

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise ValueError
        self._stack.append(self._called(str(function), arguments))

    def _called(self, function: str, arguments: tuple[Any, ...]) -> Any:
        if function == "collections.OrderedDict":
            if arguments and arguments != ([],):
                raise self._refused("makes an OrderedDict of something")
            return {}
        if function == "torch._utils._rebuild_tensor_v2" and len(arguments) in (6, 7):
            return self._tensor(arguments, None)
        if function == "torch._utils._rebuild_tensor_v3" and len(arguments) in (7, 8):
            return self._tensor(arguments, arguments[6])
        if function == "torch._utils._rebuild_parameter" and len(arguments) == 3 and type(arguments[0]) is PickledTensor:
            return arguments[0]
        raise self._refused(f"asks for {function}, which is never run")

    def _tensor(self, arguments: tuple[Any, ...], dtype: Any) -> PickledTensor:
        storage, offset, shape, strides = arguments[:4]
        if type(storage) is not Storage or not _counts((offset,)) or not _counts(shape) or not _counts(strides):
            raise ValueError
        if dtype is None:
            return PickledTensor(storage, storage.dtype, offset, shape, strides)
        if type(dtype) is not _Name or dtype.module != "torch" or dtype.name not in _DTYPES:
            raise self._refused(f"has a tensor of the dtype {_shown(dtype)}, which is not known here")
        return PickledTensor(storage, _DTYPES[dtype.name], offset, shape, strides)


def _shown(value: Any) -> str:
    return str(value) if type(value) is _Name else "something nameless"  # a nested value could be told without an end


def _opcode(code: int) -> str:
    known = {each.code: each.name for each in pickletools.opcodes}
    return f"the opcode {known.get(chr(code), hex(code))}"


def _counts(values: Any) -> bool:
    return type(values) is tuple and all(type(each) is int and 0 <= each < 1 << 50 for each in values)


_STEPS: Final[dict[int, Callable[[_Machine], None]]] = {
    ord("("): lambda machine: machine.push_new(lambda: _MARK),
    ord("}"): lambda machine: machine.push_new(dict),
    ord("]"): lambda machine: machine.push_new(list),
    ord(")"): lambda machine: machine.push_new(tuple),
    ord("N"): lambda machine: machine.push_new(lambda: None),
    0x88: lambda machine: machine.push_new(lambda: True),
    0x89: lambda machine: machine.push_new(lambda: False),
    0x80: lambda machine: machine.skip(1),  # PROTO
    0x95: lambda machine: machine.skip(8),  # FRAME
    ord("X"): lambda machine: machine.text("<I"),
    0x8C: lambda machine: machine.text("<B"),
    ord("K"): lambda machine: machine.push("<B"),
    ord("M"): lambda machine: machine.push("<H"),
    ord("J"): lambda machine: machine.push("<i"),
    ord("G"): lambda machine: machine.push(">d"),
    0x8A: _Machine.long,
    ord("c"): _Machine.name,
    0x93: _Machine.name_of_texts,  # from protocol 4 on, as is the next
    0x94: _Machine.memoize,
    ord("q"): lambda machine: machine.put("<B"),
    ord("r"): lambda machine: machine.put("<I"),
    ord("h"): lambda machine: machine.get("<B"),
    ord("j"): lambda machine: machine.get("<I"),
    ord("t"): _Machine.marked_tuple,
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("s"): _Machine.set_item,
    ord("u"): lambda machine: machine.set_items(machine.since_mark()),
    ord("a"): lambda machine: machine.append([machine._stack.pop()]),
    ord("e"): lambda machine: machine.append(machine.since_mark()),
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
    ord("R"): _Machine.call,
}

"""io_uring by its system calls and shared rings: reads queued, submitted and reaped, as far as a reader needs it.

Layouts and numbers are those of the kernel's ``include/uapi/linux/io_uring.h``. One thread makes a ring and is the only one to
touch it. The ring is asked to post completions only while that thread is in `Ring.enter` (IORING_SETUP_DEFER_TASKRUN, Linux
6.1), so that plain loads and stores of the rings are in order on any machine; an older kernel will do on x86 alone, where
they are in order anyway.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from typing import Final

from schema.errors import SllmError

__all__ = ["ASYNC", "NoRing", "Ring"]

ASYNC: Final = 1 << 4
"""Of an entry: hand it to a kernel thread at once, since it would be long in the submitter's (IOSQE_ASYNC)."""

_SETUP, _ENTER = 425, 426  # the same on every architecture
_SINGLE_ISSUER: Final = 1 << 12
_DEFER_TASKRUN: Final = 1 << 13
_CLAMP: Final = 1 << 4
_SUBMIT_ALL: Final = 1 << 7
_GETEVENTS: Final = 1 << 0
_EXT_ARG: Final = 1 << 3
_FEATURES: Final = (1 << 0) | (1 << 1) | (1 << 8)  # SINGLE_MMAP, NODROP, EXT_ARG (Linux 5.11)
_OP_POLL_ADD, _OP_ASYNC_CANCEL, _OP_READ = 6, 14, 22
_POLLIN: Final = 1
_SQES_OFFSET: Final = 0x10000000

_PARAMS = struct.Struct("=10I" + 2 * "8IQ")
_SQE = struct.Struct("=BBHiQQIIQHHiQQ")  # opcode, flags, ioprio, fd, offset, address, length, op's flags, user data, ...
_CQE = struct.Struct("=QiI")
_WAIT_ARGUMENT = struct.Struct("=QIIQ")
_TIMESPEC = struct.Struct("=qq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_setup = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, use_errno=True)(("syscall", _libc))
_enter = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t,
    use_errno=True,
)(("syscall", _libc))  # fmt: skip


class NoRing(SllmError):
    """The kernel, or what contains this process, gives no io_uring; the message says why."""


class Ring:
    """A ring for ``entries`` requests at a time. Raises NoRing, saying why, where the kernel gives none of this kind."""

    def __init__(self, entries: int) -> None:
        self._descriptor, params = _make(entries)
        sq_entries, cq_entries = params[0], params[1]
        sq, cq = params[10:19], params[19:28]
        size_bytes = max(sq[6] + sq_entries * 4, cq[5] + cq_entries * _CQE.size)
        try:
            self._rings = mmap.mmap(self._descriptor, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self._sqes = mmap.mmap(
                self._descriptor, sq_entries * _SQE.size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_SQES_OFFSET
            )
        except OSError as error:
            os.close(self._descriptor)
            raise NoRing(f"the rings of io_uring cannot be mapped: {error.strerror}") from error
        self._words = memoryview(self._rings).cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = (at // 4 for at in (sq[1], cq[0], cq[1]))
        self._sq_mask, self._cq_mask = sq_entries - 1, cq_entries - 1
        self._cqes_at = cq[5]
        self.entries = sq_entries
        for index in range(sq_entries):  # entry i of the queue is always the i-th of the array
            self._words[sq[6] // 4 + index] = index
        self._queued = 0
        self._timespec = ctypes.create_string_buffer(_TIMESPEC.size)
        self._argument = ctypes.create_string_buffer(_WAIT_ARGUMENT.size)
        _WAIT_ARGUMENT.pack_into(self._argument, 0, 0, 0, 0, ctypes.addressof(self._timespec))

    def read(
        self, descriptor: int, address: int, length: int, offset: int, user_data: int, *, rw_flags: int = 0, flags: int = 0
    ) -> None:
        """Queue a read into memory that stays until it has completed."""
        self._queue(_OP_READ, flags, descriptor, offset, address, length, rw_flags, user_data)

    def poll(self, descriptor: int, user_data: int) -> None:
        """Queue a wait, once, until a descriptor can be read."""
        self._queue(_OP_POLL_ADD, 0, descriptor, 0, 0, 0, _POLLIN, user_data)

    def cancel(self, target: int, user_data: int) -> None:
        """Queue the cancellation of the request whose user data is ``target``. Both complete."""
        self._queue(_OP_ASYNC_CANCEL, 0, -1, 0, target, 0, 0, user_data)

    def enter(self, timeout_s: float, completions: int = 1) -> None:
        """Submit what is queued, then wait until so many have completed or the time is over. Raises OSError."""
        _TIMESPEC.pack_into(self._timespec, 0, int(timeout_s), int(timeout_s % 1 * 1e9))
        count = _enter(
            _ENTER, self._descriptor, self._queued, completions, _GETEVENTS | _EXT_ARG, ctypes.addressof(self._argument),
            _WAIT_ARGUMENT.size,
        )  # fmt: skip
        if count >= 0:
            self._queued -= count
            return
        code = ctypes.get_errno()
        # Nothing was submitted: interrupted, too many completions are waiting, or memory is short for a moment.
        if code not in (errno.ETIME, errno.EINTR, errno.EBUSY, errno.EAGAIN):
            raise OSError(code, os.strerror(code))

    def completions(self) -> list[tuple[int, int]]:
        """What has completed: user data, and the result, negative for an error number."""
        head, tail = self._words[self._cq_head], self._words[self._cq_tail]
        found = []
        while head != tail:
            user_data, result, _ = _CQE.unpack_from(self._rings, self._cqes_at + (head & self._cq_mask) * _CQE.size)
            found.append((user_data, result))
            head = (head + 1) & 0xFFFFFFFF
        self._words[self._cq_head] = head
        return found

    def close(self) -> None:
        """Give the ring back; the kernel waits for, or cancels, what is under way."""
        self._words.release()
        self._rings.close()
        self._sqes.close()
        os.close(self._descriptor)

    def _queue(
        self, op: int, flags: int, descriptor: int, offset: int, address: int, length: int, op_flags: int, user_data: int
    ) -> None:
        tail = self._words[self._sq_tail]
        if self._queued >= self.entries:
            raise ValueError("the submission queue is full")
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) * _SQE.size,
            op, flags, 0, descriptor, offset, address, length, op_flags, user_data, 0, 0, 0, 0, 0,
        )  # fmt: skip
        self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        self._queued += 1


def _make(entries: int) -> tuple[int, tuple[int, ...]]:
    """A ring's descriptor and its parameters as the kernel has filled them in."""
    wanted = [_CLAMP | _SUBMIT_ALL | _SINGLE_ISSUER | _DEFER_TASKRUN]
    if platform.machine() == "x86_64":
        wanted.append(_CLAMP)
    code = 0
    for flags in wanted:
        params = ctypes.create_string_buffer(_PARAMS.pack(0, 0, flags, *[0] * 25))
        descriptor = _setup(_SETUP, entries, ctypes.addressof(params))
        if descriptor >= 0:
            found = _PARAMS.unpack(params.raw[: _PARAMS.size])
            if found[5] & _FEATURES == _FEATURES:
                return descriptor, found
            os.close(descriptor)
            raise NoRing("this kernel's io_uring is too old")
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            break
    raise NoRing(f"the system gives no io_uring: {os.strerror(code)}")

"""Tensors over memory that frees itself: what torch sees, and when it lets go."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os

import torch

from agent.native.device import DLPACK_CPU
from agent.native.dlpack import bytes_capsule


def test_tensors_share_the_memory_and_free_it_once_with_the_last_of_them() -> None:
    area = mmap.mmap(-1, 1 << 16)
    area[:] = os.urandom(len(area))
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    freed: list[int] = []
    tensor = torch.from_dlpack(bytes_capsule(address, 40000, DLPACK_CPU, 0, lambda: freed.append(1)))
    assert (tensor.dtype, tuple(tensor.shape), tensor.data_ptr()) == (torch.uint8, (40000,), address)
    assert bytes(tensor.numpy()) == area[:40000]
    view = torch.empty(0, dtype=torch.bfloat16).set_(tensor.untyped_storage(), 128, (10, 20), (20, 1))
    eight = torch.empty(0, dtype=torch.float8_e4m3fn).set_(tensor.untyped_storage(), 7, (100,), (1,))
    assert view.view(torch.int16).flatten().tolist() == tensor[256:656].view(torch.int16).tolist()
    assert eight.view(torch.uint8).tolist() == tensor[7:107].tolist()
    del tensor, view
    gc.collect()
    assert not freed
    del eight
    gc.collect()
    assert freed == [1]

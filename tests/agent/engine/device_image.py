"""A model's weights by way of a driver: copied to a device, attached by descriptor, and tensors over them."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

import msgspec
import torch
from torch.utils.dlpack import from_dlpack

from agent.engine.image import image_tensors
from agent.native.address import address_of
from agent.native.copier import Copier, CopyJob, Slice, Target
from agent.native.device import Driver
from agent.native.dlpack import bytes_capsule
from agent.native.pinned import HostMemory
from agent.store.index import index_of
from schema.checkpoint import ALIGN_BYTES, PAD_BYTES, Manifest, Partition, TensorEntry
from tests.agent.engine.models import manifest_of, tensors_of

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}


def laid_out(model: Any) -> tuple[Manifest, bytes]:
    """A model's manifest with its tensors in one partition, and the image."""
    image, entries = b"", []
    for name, tensor in tensors_of(model).items():
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        entries.append(TensorEntry(name, _NAMES[tensor.dtype], tuple(tensor.shape), 0, len(image), len(data)))
        image += data + bytes(-len(data) % ALIGN_BYTES)
    image += bytes(-len(image) % PAD_BYTES)
    partition = Partition("part-0", 0, len(image), (0,))
    return msgspec.structs.replace(manifest_of(model), partitions=(partition,), tensors=tuple(entries)), image


def tensors_on(driver: Driver, manifest: Manifest, image: bytes) -> dict[str, torch.Tensor]:
    """The stored tensors of an image on device 0, as a worker gets them from a store."""
    area = mmap.mmap(-1, -(-len(image) // mmap.PAGESIZE) * mmap.PAGESIZE)
    view = memoryview(area)
    view[: len(image)] = image
    host = HostMemory(driver)
    host.add(address_of(view), len(area))
    copier, ended = Copier(driver, host), threading.Event()

    def changed(job: CopyJob) -> None:
        if job.finished:
            ended.set()

    memory = driver.allocate(0, manifest.image_bytes)
    job = copier.submit([Target(memory, (Slice(0, manifest.image_bytes, 0),))], changed)
    copier.put(job, 0, [view[: manifest.image_bytes]])
    copier.finish(job)
    assert ended.wait(60)
    assert job.error is None
    descriptor = driver.export(memory)
    driver.free(memory)
    copier.close()
    attached = driver.attach(0, descriptor, memory.size_bytes)
    os.close(descriptor)
    capsule = bytes_capsule(attached.address, manifest.image_bytes, driver.dlpack_type, 0, lambda: driver.free(attached))
    return image_tensors(index_of(manifest.tensors, manifest), from_dlpack(capsule))

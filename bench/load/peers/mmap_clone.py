"""A memory mapping of each file and ``clone`` of every tensor: what safetensors' safe_open with get_tensor comes to."""

import json
import mmap
import struct
from pathlib import Path

import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def load(paths):
    tensors = {}
    for path in paths:
        with Path(path).open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack("<Q", view[:8])
        for name, entry in json.loads(view[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                dtype = DTYPES[entry["dtype"]]
                flat = torch.frombuffer(view, dtype=dtype, offset=8 + length + start, count=(end - start) // dtype.itemsize)
                tensors[name] = flat.view(entry["shape"]).clone()
    return tensors

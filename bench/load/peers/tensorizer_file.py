"""tensorizer, from its own format, with its own choice of readers and without its optional hash check."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorizer import TensorDeserializer, TensorSerializer


class _Holder(torch.nn.Module):
    """Flat names with dots in them are no module's: a dot becomes a character that is none in names."""


def convert(files, out):
    holder = _Holder()
    for path in files:
        for name, tensor in load_file(path).items():
            holder.register_buffer(name.replace(".", "/"), tensor)
    serializer = TensorSerializer(str(Path(out) / "model.tensors"))
    serializer.write_module(holder)
    serializer.close()


def load(paths):
    return {name: tensor for path in paths for name, tensor in TensorDeserializer(path, device="cpu").items()}

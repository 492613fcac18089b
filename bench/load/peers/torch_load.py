"""torch.load of a .bin file per shard, ``weights_only``, without mmap."""

from pathlib import Path

import torch


def convert(files, out):
    from safetensors.torch import load_file

    for path in files:
        torch.save(load_file(path), Path(out) / (Path(path).stem + ".bin"))


def load(paths):
    return {name: tensor for path in paths for name, tensor in torch.load(path, weights_only=True).items()}

"""torch.distributed.checkpoint, from its own format, into tensors made for it beforehand in `load` (they are its result)."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def convert(files, out):
    from safetensors.torch import load_file

    state = {name: tensor for path in files for name, tensor in load_file(path).items()}
    dcp.save(state, checkpoint_id=out, no_dist=True)


def load(paths):
    directory = Path(paths[0]).parent
    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state

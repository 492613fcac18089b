"""safetensors, ``load_file`` as everybody calls it: on CPU tensors over a memory mapping, whose bytes come as they are used.

So that they have come, the time includes touching every page (``LAZY``). Out of the page cache that copies nothing.
"""

from safetensors.torch import load_file

LAZY = True


def load(paths):
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}

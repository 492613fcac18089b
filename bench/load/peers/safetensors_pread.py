"""safetensors 0.9rc with ``backend="pread"``. Its prefetch loader takes CUDA devices alone."""

from safetensors.torch import load_file

PRERELEASE = "safetensors==0.9.0rc1"


def load(paths):
    return {name: tensor for path in paths for name, tensor in load_file(path, backend="pread").items()}

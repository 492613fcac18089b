"""InstantTensor, its defaults: for CUDA devices alone, and where there is none it says so."""

import instanttensor


def load(paths):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with instanttensor.safe_open(list(paths), "pt", device=device) as file:
        return dict(file.tensors())

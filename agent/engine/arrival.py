"""Weights that are still coming to where an engine lies over them, and what of the model reads which of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from agent.engine.runner import AwaitLayer
from agent.store.index import TensorIndex
from agent.store.layers import LAYER, Layers
from schema.checkpoint import Manifest

__all__ = ["Arrival"]


class Arrival:
    """``tensors`` are the checkpoint's, by name, where they come to be; ``await_layer`` says when they may be read."""

    def __init__(self, await_layer: AwaitLayer, manifest: Manifest, index: TensorIndex, tensors: Mapping[str, Tensor]) -> None:
        self.await_layer = await_layer
        self._ends = Layers(manifest).ends
        self._index = index
        self._tensors = tensors

    @property
    def layers(self) -> int:
        """How many there are; asked for by this number, all of the weights are meant."""
        return len(self._ends)

    def needs(self, model: nn.Module) -> dict[nn.Module, int]:
        """The decoder layers of an attached model and, outside of them, the modules that hold weights: each with the layer
        that must have come before it computes."""
        needs: dict[nn.Module, int] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            within = LAYER.search(f"{name}.")
            reader = module if within is None else model.get_submodule(name[: within.end() - 1])
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and (layer := self._layer_at.get(tensor.data_ptr())) is not None:
                    needs[reader] = max(needs.get(reader, 0), layer)
        return needs

    @cached_property
    def _layer_at(self) -> dict[int, int]:
        """With which layer each tensor has come, by its address; so that ties and other names are the same tensor."""
        layers = np.searchsorted(np.asarray(self._ends), self._index.starts + self._index.sizes).tolist()
        named = zip(self._index.names, layers, strict=True)
        return {self._tensors[name].data_ptr(): layer for name, layer in named if self._tensors[name].numel()}

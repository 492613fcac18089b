"""A tiny model's weights in an image, in the order of ingest, that come layer by layer as its engine asks for them."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from agent.engine.arrival import Arrival
from agent.engine.build import assemble, can_follow
from agent.engine.engine import BatchEngine
from agent.engine.image import image_tensors
from agent.engine.skeleton import build_skeleton
from agent.engine.weights import attach
from agent.store.index import index_of
from agent.store.ingest.order import execution_key
from agent.store.layers import Layers, layer_ends
from schema.checkpoint import ALIGN_BYTES, Partition, TensorEntry
from schema.link import EngineOptions
from tests.agent.engine.models import manifest_of, tensors_of


class ComingWeights:
    """What has not come is NaN, in every numeric type. ``asked`` are the layers that were waited for, in order. ``bare``: the
    names are those of a checkpoint that was saved of the model without its head."""

    def __init__(self, model: Any, dtype: str = "F32", bare: bool = False) -> None:
        prefix = f"{model.base_model_prefix}." if bare else ""
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors_of(model).items()}
        entries: list[TensorEntry] = []
        image = bytearray()
        for name in sorted(tensors, key=execution_key):
            tensor = tensors[name]
            image += bytes(-len(image) % ALIGN_BYTES)
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            entries.append(TensorEntry(name, dtype, tuple(tensor.shape), 0, len(image), len(data)))
            image += data
        image += bytes(-len(image) % 4096)
        partitions = (Partition("p0", 0, len(image), (0,)),)
        self.manifest = msgspec.structs.replace(
            manifest_of(model, dtype), partitions=partitions, layer_ends=layer_ends(entries, partitions)
        )
        self.asked: list[int] = []
        self._index = index_of(entries, self.manifest)
        self._image = bytes(image)
        self._memory = bytearray(b"\xff" * len(image))

    def engine(self, options: EngineOptions, **more: Any) -> BatchEngine:
        model = build_skeleton(self.manifest)
        assert can_follow(model, self.manifest, self._index)
        tensors = image_tensors(self._index, self._memory)
        attach(model, self.manifest, tensors, "cpu")
        arrival = Arrival(self.await_layer, self.manifest, self._index, tensors)
        return assemble(model, self.manifest, options, arrival=arrival, **more)

    def begin_anew(self) -> None:
        """What has come is gone again, as when the store dies."""
        self._memory[:] = b"\xff" * len(self._memory)

    def await_layer(self, layer: int) -> None:
        self.asked.append(layer)
        ends = Layers(self.manifest).ends
        come = ends[layer] if layer < len(ends) else len(self._image)
        self._memory[:come] = self._image[:come]

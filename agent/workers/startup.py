"""A worker on its way to being ready: the model of its checkpoint, then the weights where the store has them, then an engine.

Knows nothing of links: told what the agent said, it says what has come of it, or raises why this start has failed.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from agent.config import NodeConfig
from agent.engine.arrival import Arrival
from agent.engine.build import assemble, can_follow
from agent.engine.engine import BatchEngine
from agent.engine.image import image_tensors
from agent.engine.kept import SkeletonCache
from agent.engine.runner import AwaitLayer
from agent.engine.threads import threads_for
from agent.engine.weights import attach
from agent.native.device import open_driver
from agent.native.dlpack import bytes_capsule
from agent.native.mapping import ImageMapping
from agent.store.catalog import MANIFEST_FILE
from agent.store.index import TensorIndex, read_index
from agent.workers.coming import Coming
from schema.checkpoint import Manifest, decode_manifest
from schema.errors import Conflict, InvalidCheckpoint, LinkError, NotFound
from schema.link import Arriving, Attach, LayersArrived, StartPhases, StartWorker
from schema.logs import about

__all__ = ["Startup"]

_log = logging.getLogger(__name__)


class Startup:
    """``began_s`` (monotonic) is when this process began. The engine asks ``await_layer`` for weights that are still coming."""

    def __init__(self, config: NodeConfig, began_s: float, await_layer: AwaitLayer) -> None:
        self._config = config
        self._began_s = began_s
        self._await_layer = await_layer
        self._asked: StartWorker | None = None
        self._built: tuple[nn.Module, Manifest, TensorIndex] | None = None
        self._descriptor = -1
        self._mapping: ImageMapping | None = None
        self._coming: Coming | None = None
        self._attached: Attach | None = None
        self._phases = StartPhases()

    @property
    def asked(self) -> StartWorker | None:
        return self._asked

    @property
    def attached(self) -> Attach | None:
        """Where all of the weights lie; None as long as one is missing."""
        return self._attached

    @property
    def phases(self) -> StartPhases:
        """What this start took so far."""
        return self._phases

    def has(self, layer: int) -> bool:
        """Whether the engine may read this layer and all before it."""
        return self._coming is None or self._coming.has(layer)

    def begin(self, message: StartWorker) -> None:
        """Build the skeleton, while the store still loads the weights. Raises what makes a model that cannot be built."""
        self._asked = message
        began_s = time.monotonic()
        manifest, index = self._find(message)
        given = message.start.options.threads or self._config.threads
        torch.set_num_threads(given or threads_for(manifest.image_bytes, len(os.sched_getaffinity(0))))
        model = SkeletonCache(self._config.skeletons_path).skeleton(manifest)
        self._built = model, manifest, index
        self._phases = StartPhases(fork_s=began_s - self._began_s, build_s=time.monotonic() - began_s)

    def keep(self, descriptors: Sequence[int]) -> None:
        """The last of these is of the memory that is told of next; the others, and an earlier one, are closed."""
        for descriptor in [self._descriptor, *descriptors[:-1]]:
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = descriptors[-1] if descriptors else -1

    def take(self, message: Arriving | Attach) -> BatchEngine | None:
        """Weights are where this says, or are coming to be there. Returns the engine over them if it is made by this; one that
        was made over weights on their way has more of them now.

        Raises what makes a start fail: Conflict for another copy's image, InvalidCheckpoint, LinkError, OutOfSpace and others.
        """
        if self._built is None or self._asked is None or self._attached is not None:
            return None
        try:
            if self._coming is None:
                return self._assemble(message, *self._built)
            self._coming.told(self._descriptor, message)
        finally:
            self.keep(())
        if isinstance(message, Attach):
            self._attached = message
            self._phases = msgspec.structs.replace(self._phases, total_s=time.monotonic() - self._began_s)
        return None

    def arrived(self, message: LayersArrived) -> None:
        """So many layers have come."""
        if self._coming is not None:
            self._coming.layers = message.layers

    def _find(self, message: StartWorker) -> tuple[Manifest, TensorIndex]:
        """Manifest and list of tensors."""
        directories = [self._config.checkpoints_path / directory for directory in message.directories]
        for directory, following in pairwise(directories):
            try:
                return _read(directory, message.start.digest)
            except (NotFound, InvalidCheckpoint):
                if not following.is_dir():  # else it was moved there, perhaps between two files
                    raise
        return _read(directories[-1], message.start.digest)

    def _assemble(
        self, message: Arriving | Attach, model: nn.Module, manifest: Manifest, index: TensorIndex
    ) -> BatchEngine | None:
        """Weights over the store's memory, and KV memory; None for weights on their way that this model cannot follow.

        On a processor nobody waits for a first step: it costs as much as the step that a cold request is waiting for.
        """
        assert self._asked is not None
        if isinstance(message, Arriving) and not can_follow(model, manifest, index):
            return None
        began_s = time.monotonic()
        if self._descriptor < 0:
            raise LinkError(f"{type(message).__name__} came without the memory's descriptor")
        if message.image_id not in ("", manifest.image_id):  # looked at first, for most copies differ in size too
            raise Conflict(f"the image is another copy's of {manifest.digest}, whose tensors lie elsewhere; start it again")
        if message.image_bytes != manifest.image_bytes:
            raise InvalidCheckpoint(f"the image has {message.image_bytes} bytes, the manifest says {manifest.image_bytes}")
        image, device = self._map(message)
        tensors = image_tensors(index, image)
        attach(model, manifest, tensors, device)
        attached_s = time.monotonic()
        arrival = None if self._coming is None else Arrival(self._await_layer, manifest, index, tensors)
        engine = assemble(model, manifest, self._asked.start.options, device, arrival=arrival)
        if device != "cpu":
            engine.warm()
        gc.freeze()
        now = time.monotonic()
        self._attached = message if isinstance(message, Attach) else None
        self._phases = msgspec.structs.replace(
            self._phases, attach_s=attached_s - began_s, warm_s=now - attached_s, total_s=now - self._began_s
        )
        model_name, total_s = self._asked.start.model, self._phases.total_s
        _log.info("ready", extra=about(model=model_name, after_s=total_s, kv_tokens=engine.capacity.kv_tokens))
        return engine

    def _map(self, message: Arriving | Attach) -> tuple[Any, str]:
        """The image where the store has it, or is bringing it, and the device of torch that it lies on."""
        if isinstance(message, Arriving):
            self._coming = Coming(self._descriptor, message)
            return self._coming.mapping.buffer, "cpu"
        weights = message.weights
        if weights is None:
            self._mapping = ImageMapping(self._descriptor, message.extents, message.image_bytes)
            return self._mapping.buffer, "cpu"
        driver = open_driver()
        memory = driver.attach(weights.device, self._descriptor, weights.size_bytes)
        freed = partial(driver.free, memory)
        capsule = bytes_capsule(memory.address, weights.image_bytes, driver.dlpack_type, weights.device, freed)
        return from_dlpack(capsule), driver.torch_device(weights.device)


def _read(directory: Path, digest: str) -> tuple[Manifest, TensorIndex]:
    path = directory / MANIFEST_FILE
    try:
        manifest = decode_manifest(path.read_bytes())
    except OSError as error:
        raise NotFound(f"cannot read the manifest {path}: {error.strerror}") from error
    if manifest.digest != digest:
        raise InvalidCheckpoint(f"{path} is of checkpoint {manifest.digest}, not of {digest}")
    return manifest, read_index(directory, manifest)

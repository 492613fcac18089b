"""Weights that are still on their way into the arena: where a worker sees them, and how many layers of them have come."""

from __future__ import annotations

from agent.native.mapping import ImageMapping
from schema.errors import Conflict, InvalidCheckpoint, LinkError
from schema.link import Arriving, Attach

__all__ = ["Coming"]


class Coming:
    """Over the memory that ``message`` names, by the descriptor that came before it. Raises LinkError, OutOfSpace."""

    def __init__(self, descriptor: int, message: Arriving) -> None:
        self._place = message.arena, message.extents
        self._image_id = message.image_id
        self.mapping = ImageMapping(descriptor, message.extents, message.image_bytes)
        self.layers = message.layers
        self.whole = False

    def told(self, descriptor: int, message: Arriving | Attach) -> None:
        """More of it has come, or with `Attach` all. A store that was restarted may have begun anew elsewhere: then that is
        mapped in its place. Raises Conflict for another copy's image, InvalidCheckpoint for one of another size, LinkError,
        OutOfSpace."""
        if message.image_id != self._image_id:
            raise Conflict("the image that was coming has become another copy's, whose tensors lie elsewhere; start it again")
        if message.image_bytes != self.mapping.image_bytes:
            raise InvalidCheckpoint(f"an image of {self.mapping.image_bytes} bytes has become one of {message.image_bytes}")
        place = message.arena, message.extents
        if place != self._place:
            if descriptor < 0:
                raise LinkError("the weights lie elsewhere now, and no descriptor came with that")
            self.mapping.remap(descriptor, message.extents)
            self._place = place
        if isinstance(message, Arriving):
            self.layers = message.layers
        else:
            self.whole = True

    def has(self, layer: int) -> bool:
        """Whether this layer has come, and all before it; what lies behind the last layer comes with the whole."""
        return self.whole or layer < self.layers

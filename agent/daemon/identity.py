"""Whose node this is: the name and cluster it was claimed for, and the newest manager generation it has seen."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.daemon.files import write_atomic
from schema.errors import Conflict, InvalidInput
from schema.link import Hello

__all__ = ["Identity", "IdentityFile"]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An unclaimed node has neither name nor cluster."""

    node: str = ""
    cluster: str = ""
    generation: int = 0


class IdentityFile:
    """``identity.json`` in the data directory. Raises InvalidInput when it is there and cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.identity = msgspec.json.decode(path.read_bytes(), type=Identity)
        except FileNotFoundError:
            self.identity = Identity()
        except (OSError, msgspec.DecodeError) as error:
            raise InvalidInput(f"cannot read {path}: {error}; restore it, or remove it to unclaim this node") from error

    def judge(self, hello: Hello) -> Identity:
        """What the identity becomes when this manager is welcomed.

        Raises InvalidInput for one without cluster or node, Conflict for another cluster, node or an older generation.
        """
        known = self.identity
        if not hello.cluster or not hello.node or hello.generation < 0:
            raise InvalidInput("a manager's Hello names its cluster, its generation and the node")
        if known.cluster and hello.cluster != known.cluster:
            raise Conflict(
                f"this node belongs to cluster {known.cluster}, not to {hello.cluster}; "
                f"remove {self._path} to give it to another cluster"
            )
        if known.node and hello.node != known.node:
            raise Conflict(f"this node is {known.node!r}, not {hello.node!r}")
        if hello.generation < known.generation:
            raise Conflict(
                f"manager generation {hello.generation} is older than {known.generation}, which this node has seen; "
                "a newer manager has taken over"
            )
        return Identity(hello.node, hello.cluster, hello.generation)

    def write(self, identity: Identity) -> None:
        """Keep it for good, before anything is done for that manager. Raises OSError."""
        if identity != self.identity:
            write_atomic(self._path, msgspec.json.encode(identity))
            self.identity = identity

"""What agent and store say to each other."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from schema.link.base import Count, Message
from schema.link.handshake import DeviceWeights
from schema.link.node import ArenaInfo
from schema.states import Tier

__all__ = [
    "ArenaState",
    "Arriving",
    "CancelFetch",
    "CancelVerify",
    "DropDevice",
    "DropResident",
    "Evicted",
    "EvictedDevice",
    "Extent",
    "FetchStored",
    "Fetching",
    "FillArena",
    "FillDevice",
    "HoldCheckpoint",
    "HoldDevice",
    "LayersArrived",
    "OnDevice",
    "PinResidents",
    "ReleasedDevice",
    "ReserveDevice",
    "Resident",
    "StoreTruth",
    "VerifyStored",
]


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A run of adjacent arena bytes, multiples of the page size; a checkpoint's image is its extents in order."""

    offset_bytes: int
    size_bytes: int


class FillArena(Message, frozen=True, kw_only=True, tag="fill"):
    """Agent -> store: read the checkpoint in ``directory`` into the arena, evicting only what the store may.

    ``users`` hold it from now on. Answered, at once if it is there already, by `Resident` or `OperationDone` with a fault, and
    with this ``op``. ``directory`` is relative to the node's checkpoints directory. ``priority``: 0 if an instance waits for
    it, 1 if it is read ahead of need; a fill under way is raised by one that is more urgent. ``image_id`` is of the manifest
    there, "" if that is not known; a Conflict when another image of the digest lies in the arena, or comes.
    """

    op: str
    digest: str
    directory: str
    image_id: str = ""
    users: int = 1
    priority: Annotated[int, Meta(ge=0, le=2)] = 0


class Resident(Message, frozen=True, kw_only=True, tag="resident"):
    """Store -> agent: the whole image lies in the arena at ``extents``; said after a fill, and repeated in `StoreTruth`.

    ``read_bytes`` were read from disk for this answer, 0 if it was there. ``condemned`` says which bytes of it were found
    wrong: it goes when its last user has gone, and no other gets it. ``image_id``: `Manifest.image_id`.
    """

    digest: str
    image_id: str = ""
    extents: tuple[Extent, ...]
    image_bytes: int
    users: int = 0
    op: str = ""
    read_bytes: int = 0
    condemned: str = ""


class Arriving(Message, frozen=True, kw_only=True, tag="arriving"):
    """Store -> agent -> worker: an image comes to lie in the arena at ``extents``, whole soon; its first ``layers`` layers,
    with all that is before them, are there and right. What has not come is not to be read, and no result of it is to be told
    before `Resident`. `LayersArrived` follows as more come. Said of no image that is there at once or has no known layers.

    ``arena`` is what the agent adds.
    """

    op: str
    digest: str
    image_id: str = ""
    extents: tuple[Extent, ...]
    image_bytes: int
    layers: Count
    arena: str = ""


class LayersArrived(Message, frozen=True, kw_only=True, tag="layersarrived"):
    """Store -> agent -> worker: so many layers of what is `Arriving` are there now."""

    op: str
    layers: Count


class HoldCheckpoint(Message, frozen=True, kw_only=True, tag="hold"):
    """Agent -> store: how many instances and loads use a checkpoint now, fills not yet answered included.

    With 0 it may be evicted when room is needed, and a fill that nobody waits for is given up. ``condemned`` repeats what the
    store once said of it, for a store that was restarted since.
    """

    digest: str
    users: Count
    condemned: str = ""


class DropResident(Message, frozen=True, kw_only=True, tag="dropresident"):
    """Agent -> store: free a checkpoint's chunks; answered by `OperationDone`, a Conflict when it has users or is pinned.

    With ``image_id`` only those of this image, which is of no use any more: no pin keeps it, nor who is counted, since those
    wait for another; `Evicted` tells why. A Conflict when its own copy is just being fetched.
    """

    op: str
    digest: str
    image_id: str = ""


class PinResidents(Message, frozen=True, kw_only=True, tag="pinresidents"):
    """Agent -> store: all checkpoints that are kept in the arena once they are there. Said after every truth."""

    digests: tuple[str, ...] = ()


class VerifyStored(Message, frozen=True, kw_only=True, tag="verifystored"):
    """Agent -> store: compare the checksums of the copy in ``directory``, and of the image in the arena if it lies there.

    Read behind everything that anybody waits for. `Progress` tells how far it is; answered by one `OperationDone`.
    ``directory`` is relative to the node's checkpoints directory.
    """

    op: str
    digest: str
    directory: str


class CancelVerify(Message, frozen=True, kw_only=True, tag="cancelverify"):
    """Agent -> store: nobody waits for this verification any more. It is not answered."""

    op: str


class FetchStored(Message, frozen=True, kw_only=True, tag="fetchstored"):
    """Agent -> store: bring a checkpoint from the remote at ``url`` to the disk and, with ``in_memory``, into the arena as it
    comes, held by ``users`` from then on; where the arena has no room, to the disk alone. What comes into the arena goes on to
    ``devices`` as it comes, where somebody holds it: a `FillDevice` that follows finds it there, or under way.

    `Fetching` tells where it comes to lie, `Progress` how far it is; answered by one `OperationDone`. A digest under way is
    not fetched twice.
    """

    op: str
    digest: str
    url: str
    layout: str = ""
    in_memory: bool = False
    users: Count = 0
    devices: tuple[int, ...] = ()


class Fetching(Message, frozen=True, kw_only=True, tag="fetching"):
    """Store -> agent: the manifest of what ``op`` asked for is judged, and lies with all small files in ``directory``, relative
    to the node's data, until the copy is committed as ``layout`` of its digest. With ``in_memory`` its image, of
    ``image_bytes``, comes to lie in the arena, or does already: a `FillArena` joins that.
    """

    op: str
    digest: str
    image_id: str = ""
    layout: str
    directory: str
    in_memory: bool
    image_bytes: Count = 0


class CancelFetch(Message, frozen=True, kw_only=True, tag="cancelfetch"):
    """Agent -> store: nobody waits for this op any more. It is not answered; a fetch without ops is given up. With ``keep``
    what has come of it stays on the disk, since somebody may ask again."""

    op: str
    keep: bool = False


class Evicted(Message, frozen=True, kw_only=True, tag="evicted"):
    """Store -> agent: these chunks are free or being filled with something else; no new mapping may be made of them. ``why``
    they went, and the checkpoint ``for_digest`` that came in their place, "" if none did."""

    digest: str
    why: str = ""
    for_digest: str = ""


class ArenaState(Message, frozen=True, kw_only=True, tag="arenastate"):
    """Store -> agent: the arena as it is now; said as its pages become present."""

    arena: ArenaInfo


class FillDevice(Message, frozen=True, kw_only=True, tag="filldevice"):
    """Agent -> store: bring the checkpoint in ``directory`` onto ``devices``, by way of DRAM where there is room for it, each
    byte read once; `ReserveDevice` came before. Answered like `FillArena`, by `OnDevice` or `OperationDone` with a fault.
    """

    op: str
    digest: str
    directory: str
    image_id: str = ""
    devices: tuple[int, ...]
    users: int = 1
    priority: Annotated[int, Meta(ge=0, le=2)] = 0


class OnDevice(Message, frozen=True, kw_only=True, tag="ondevice"):
    """Store -> agent: the image lies on each device that was asked for; their `Descriptors` came before. ``source`` is the tier
    that it came from for this answer, DEVICE if it was there; ``read_bytes`` of it came from disk."""

    op: str
    digest: str
    weights: tuple[DeviceWeights, ...]
    source: Tier
    read_bytes: int = 0


class HoldDevice(Message, frozen=True, kw_only=True, tag="holddevice"):
    """Agent -> store: how many instances use weights on a device now; as `HoldCheckpoint`."""

    digest: str
    device: int
    users: Count


class ReserveDevice(Message, frozen=True, kw_only=True, tag="reservedevice"):
    """Agent -> store: what the KV caches of this node's instances take of a device; idle weights make room for it."""

    device: int
    size_bytes: Count


class DropDevice(Message, frozen=True, kw_only=True, tag="dropdevice"):
    """Agent -> store: free a checkpoint on the devices where nobody uses it; `OperationDone` follows on `EvictedDevice`.

    With ``device`` only the weights of this image there, which are of no use any more: who is counted waits for others, and
    `EvictedDevice` tells why.
    """

    op: str
    digest: str
    image_id: str = ""
    device: int | None = None


class EvictedDevice(Message, frozen=True, kw_only=True, tag="evicteddevice"):
    """Store -> agent: close your descriptor of these weights, map them nowhere any more, and answer with `ReleasedDevice`.
    ``why`` and ``for_digest`` as in `Evicted`; without a ``why`` their checkpoint was asked to go."""

    id: str
    why: str = ""
    for_digest: str = ""


class ReleasedDevice(Message, frozen=True, kw_only=True, tag="releaseddevice"):
    """Agent -> store: no descriptor of these is held here any more; their memory is free."""

    id: str


class StoreTruth(Message, frozen=True, kw_only=True, tag="storetruth"):
    """All that the arena holds. After a restart of the store it is what the chunk table in the arena itself says.

    ``filling`` are the ops of fills under way, ``fetching`` those of fetches. ``weights`` lie on devices, and all their
    descriptors came before; those in ``evicting`` are to be released. What else of devices the agent holds is nobody's.
    """

    arena: ArenaInfo
    residents: tuple[Resident, ...] = ()
    filling: tuple[str, ...] = ()
    weights: tuple[DeviceWeights, ...] = ()
    evicting: tuple[str, ...] = ()
    fetching: tuple[str, ...] = ()

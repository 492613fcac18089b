"""The first words of every connection, what keeps it alive, and the descriptors that travel on it."""

from __future__ import annotations

from enum import StrEnum

from schema.errors import Fault
from schema.ids import Epoch
from schema.link.base import PROTOCOL, PROTOCOL_OLDEST, Count, Message, Part

__all__ = ["Descriptors", "DeviceWeights", "Hello", "Ping", "Pong", "Refused", "Role", "Welcome"]


class Role(StrEnum):
    MANAGER = "manager"
    STORE = "store"
    ZYGOTE = "zygote"
    WORKER = "worker"


class Hello(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="hello"):
    """First frame of a dialler; fields that a newer build adds are passed over, so that versions can be compared.

    ``cluster`` and ``generation`` are the manager's; an agent refuses another cluster's manager and an older generation.
    ``node`` is the name a manager has for this agent: an unclaimed agent takes cluster and name for good, a claimed one
    refuses others. ``instance``, ``epoch`` and ``nonce`` (of its `Fork`) are a worker's. ``token`` proves that store,
    zygote and worker are this agent's kin: it is the content of the file that the agent made (mode 0600) in its run
    directory.
    """

    role: Role
    protocol_oldest: int = PROTOCOL_OLDEST
    protocol: int = PROTOCOL
    software: str
    pid: int
    cluster: str = ""
    generation: int = 0
    node: str = ""
    instance: str = ""
    epoch: Epoch = Epoch(0)
    nonce: int = 0
    token: str = ""


class Welcome(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="welcome"):
    """The agent accepts; ``protocol`` is the version both will speak. ``node`` is the agent's name, "" if unclaimed.

    ``descriptors``: so many `Descriptors` messages follow at once, before anything else (a store gets its arena back; with
    0 it offers its own, or makes one).
    """

    protocol: int
    software: str
    node: str
    pid: int
    descriptors: int = 0


class Refused(Message, frozen=True, kw_only=True, forbid_unknown_fields=False, tag="refused"):
    """The agent will not talk to this dialler and closes; the fault says why and what to do."""

    fault: Fault


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Answered at once by `Pong` with the same ``nonce``; either side may ask."""

    nonce: int


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    nonce: int


class DeviceWeights(Part, frozen=True, kw_only=True):
    """One checkpoint's image in a device's memory: ``id`` is drawn when that is made, ``size_bytes`` is what is mapped.
    ``image_id``: `Manifest.image_id`."""

    id: str
    digest: str
    image_id: str = ""
    device: int
    size_bytes: Count
    image_bytes: Count
    users: int = 0


class Descriptors(Message, frozen=True, kw_only=True, tag="fds"):
    """Unix sockets of one host only: ``count`` descriptors travel with this frame as SCM_RIGHTS.

    ``what`` is "arena" (read and write, store <-> agent), "arena-ro" (to a worker, just before `Attach`) or "device": memory of
    a device with the ``weights`` in it (store <-> agent; to a worker just before `Attach`), one descriptor.
    """

    what: str
    count: int = 1
    weights: DeviceWeights | None = None

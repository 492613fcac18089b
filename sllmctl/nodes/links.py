"""Links to the nodes: dialled for ever, one connection per node, truth first, then both ways.

A link is up from its node's `TruthEnd` on. What is sent to one that is not is dropped, as the effects' contract says: the truth
decides anew. Frames go to the router as they come, in one call each, without a task or a timer in between.

Links acknowledges no operations: an `OperationDone` is posted to the control loop, whose own Send(OperationsAcked) follows the
commit of what it learnt from it. Until then a restarted manager hears of it again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from schema.errors import InvalidInput, LinkError, Unreachable
from schema.link import Hello, LogChunk, ManagerMessage, ReadFile, ReadLog, Role
from sllmctl.control.events import Event
from sllmctl.nodes.connection import LinkListener
from sllmctl.nodes.dialer import Dialer
from sllmctl.nodes.local import LocalAgent
from sllmctl.nodes.settings import LinkSettings

__all__ = ["LinkListener", "Links", "parse_address"]


def parse_address(address: str) -> str:
    """The socket's path of a ``unix:/path`` address. Raises InvalidInput for any other scheme."""
    scheme, _, rest = address.partition(":")
    if scheme != "unix":
        raise InvalidInput(
            f"node address {address!r}: unknown scheme {scheme!r}; this build reaches agents by unix:/path", "address"
        )
    if not rest.startswith("/") or len(os.fsencode(rest)) > 107:
        raise InvalidInput(f"node address {address!r}: not an absolute path of at most 107 bytes", "address")
    return rest


class Links:
    """One link per node. ``local`` is asked for a living agent whenever dialling its address fails."""

    def __init__(
        self,
        *,
        cluster: str,
        generation: int,
        software: str,
        router: LinkListener,
        post: Callable[[Event], None],
        settings: LinkSettings,
        local: LocalAgent | None = None,
    ) -> None:
        self._cluster = cluster
        self._generation = generation
        self._software = software
        self._router = router
        self._post = post
        self._settings = settings
        self._local = local
        self._links: dict[str, Dialer] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ops = itertools.count(1)

    def connect(self, node: str, address: str) -> None:
        """Hold a link to this node from now on. A known node with the same address is left as it is. Raises InvalidInput."""
        path = parse_address(address)
        if (known := self._links.get(node)) is not None:
            if known.path == path:
                return
            self.disconnect(node)
        local = self._local if self._local is not None and self._local.address == address else None
        hello = Hello(
            role=Role.MANAGER,
            software=self._software,
            pid=os.getpid(),
            cluster=self._cluster,
            generation=self._generation,
            node=node,
        )
        link = Dialer(node, path, hello, router=self._router, post=self._post, settings=self._settings, local=local)
        if local is not None:
            local.say = link.send
        self._links[node] = link

    def disconnect(self, node: str) -> None:
        """Give the link up; unknown nodes are ignored."""
        if (link := self._links.pop(node, None)) is not None:
            link.task.cancel()
            self._closing.add(link.task)
            link.task.add_done_callback(self._closing.discard)

    def send(self, node: str, message: ManagerMessage) -> None:
        """Say this to a node; dropped while its link is not up."""
        if (link := self._links.get(node)) is not None:
            link.send(message)

    def is_up(self, node: str) -> bool:
        """True from the end of a node's truth to the loss of that connection."""
        return (link := self._links.get(node)) is not None and link.steady is not None

    async def ready(self, node: str, timeout_s: float) -> None:
        """Wait until the link is up.

        Raises the agent's own refusal (Conflict when it belongs to another manager), TimedOut, or Unreachable for a node that
        is not connected to.
        """
        link = self._links.get(node)
        if link is None:
            raise Unreachable(f"there is no link to node {node}")
        await link.ready(timeout_s)

    async def read_file(self, node: str, digest: str, file: str) -> bytes:
        """A text asset of a checkpoint, or ``manifest.json``, part by part.

        Raises the agent's fault, Unreachable when the link is or goes down, TimedOut, or LinkError for what is too large.
        """
        link = self._links.get(node)
        if link is None or link.steady is None:
            raise Unreachable(f"the link to node {node} is down")
        data = bytearray()
        while True:
            op = f"read-{next(self._ops)}"
            chunk = await link.ask_file(ReadFile(op=op, digest=digest, file=file, offset_bytes=len(data)))
            if chunk.fault is not None:
                raise chunk.fault.to_error()
            limit = self._settings.max_file_bytes
            if chunk.size_bytes > limit:
                raise LinkError(f"{file} of {digest[:12]} has {chunk.size_bytes} bytes on node {node}; the limit is {limit}")
            data += chunk.data
            if len(data) == chunk.size_bytes:
                return bytes(data)
            if not chunk.data or chunk.offset_bytes + len(chunk.data) != len(data) or len(data) > chunk.size_bytes:
                raise LinkError(f"node {node} answered for {file} with a part that does not fit: it changed meanwhile")

    async def read_log(self, node: str, wanted: ReadLog) -> LogChunk:
        """A page of a log of a node; ``wanted`` needs no ``op``. Raises as `read_file`."""
        link = self._links.get(node)
        if link is None or link.steady is None:
            raise Unreachable(f"the link to node {node} is down")
        chunk = await link.ask_log(msgspec.structs.replace(wanted, op=f"log-{next(self._ops)}"))
        if chunk.fault is not None:
            raise chunk.fault.to_error()
        return chunk

    def families(self) -> Iterable[Metric]:
        """The links as Prometheus metrics."""
        up = GaugeMetricFamily("sllm_link_up", "1 while the link to a node is up.", labels=("node",))
        taken = CounterMetricFamily("sllm_link_connections", "How often the link to a node came up.", labels=("node",))
        trip = GaugeMetricFamily(
            "sllm_link_round_trip_seconds", "What the last heartbeat of a node's link took there and back.", labels=("node",)
        )
        for node, link in self._links.items():
            up.add_metric((node,), float(link.steady is not None))
            taken.add_metric((node,), link.times_up)
            if link.steady is not None and link.steady.round_trip_s is not None:
                trip.add_metric((node,), link.steady.round_trip_s)
        return (up, taken, trip)

    async def close(self) -> None:
        """Close every link and wait until their tasks have ended."""
        for node in list(self._links):
            self.disconnect(node)
        await asyncio.gather(*self._closing, return_exceptions=True)

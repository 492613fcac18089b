"""`sllmctl serve`: the manager's parts made and joined, started in order, and stopped in the reverse.

What may be refused (a port, the admin socket, the database, a newer schema) is tried before anything is started or changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from schema.admin import StatusView
from schema.errors import InvalidInput, SllmError, TimedOut, Unreachable
from schema.ids import EpochCounter, system_ids
from schema.states import NodeState
from sllmctl import __version__
from sllmctl.control.clock import LoopClock
from sllmctl.control.events import AddNode, Close
from sllmctl.control.gauges import cluster_gauges, decision_counts
from sllmctl.control.live import LiveEffects
from sllmctl.control.loop import ControlLoop
from sllmctl.control.runner import Runner
from sllmctl.control.starts import StartMeter
from sllmctl.control.watched import WatchedDatabase
from sllmctl.gateway.admin.app import admin_app
from sllmctl.gateway.admin.explanations import Explanations
from sllmctl.gateway.admin.feed import Feed
from sllmctl.gateway.admin.logs import Logs
from sllmctl.gateway.app import api_app
from sllmctl.gateway.metrics import Metrics
from sllmctl.gateway.router import Router
from sllmctl.gateway.server import server_config
from sllmctl.gateway.text import TextService
from sllmctl.listeners import bind_tcp, bind_unix
from sllmctl.nodes.assets import Assets
from sllmctl.nodes.links import Links
from sllmctl.nodes.local import LocalAgent, need_memory
from sllmctl.planner.estimates import Estimates
from sllmctl.planner.interface import Abilities
from sllmctl.planner.planner import LocalityPlanner
from sllmctl.state import Cluster, Database

if TYPE_CHECKING:
    from sllmctl.cluster.changes import PutEstimate
    from sllmctl.cluster.view import ClusterView
    from sllmctl.config import Settings

__all__ = ["run"]

log = logging.getLogger("sllmctl.serve")


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; then drain, stop what was started, and return 0. A second signal does not wait.

    Raises Conflict for a taken port, socket or database, InvalidInput for settings that cannot work, and whatever ended the
    control loop.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    need_memory(settings.node)
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"cannot make the state directory {settings.state_dir}: {error.strerror}; name a writable one in state_dir",
            "state_dir",
        ) from error
    async with contextlib.AsyncExitStack() as stack:
        database = await Database.open(
            settings.database_url,
            backup_dir=settings.state_dir / "backups",
            events_keep=settings.control.events_keep,
            outcomes_keep=settings.control.outcomes_keep,
        )
        stack.push_async_callback(database.close)
        api_socket = stack.enter_context(bind_tcp(settings.api.host, settings.api.port, anywhere=settings.api.without_keys))
        admin_socket = stack.enter_context(_bound_admin(settings.admin_socket))
        cluster = await database.claim(time.time(), str(uuid.uuid4()))
        host, port = api_socket.getsockname()[:2]
        api_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        manager = Manager(settings, database, cluster, await database.load(), await database.estimates(), api_url)
        await manager.serve(api_socket, admin_socket)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the manager decides when, and in which order, its servers end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Where it does not wait, uvicorn leaves the application's lifespan to be cancelled, and logs that as an error."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


class Manager:
    """The parts of one manager, joined. Made before anything runs; `serve` starts them and ends them."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        cluster: Cluster,
        view: ClusterView,
        learned: Sequence[PutEstimate],
        api_url: str,
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._view = view
        self._api_url = api_url
        self._started_at = time.time()
        self._stopping = False
        epochs = EpochCounter(cluster.generation)
        clock = LoopClock()  # one for all that compare what they noted with what the loop did
        # The router speaks to links and loop, which are made of it: so it gets them by name.
        self._router = Router(
            send=lambda node, message: self._links.send(node, message),
            post=lambda event: self._runner.post(event),
            epochs=epochs,
            ids=system_ids,
            settings=settings.router,
            clock=clock,
        )
        self._local = LocalAgent(settings.node, settings.local)
        self._links = Links(
            cluster=cluster.uuid,
            generation=cluster.generation,
            software=__version__,
            router=self._router,
            post=lambda event: self._runner.post(event),
            settings=settings.links,
            local=self._local,
        )
        self._assets = Assets(settings.state_dir / "assets", self._links, settings.assets)
        control = settings.control
        estimates = Estimates(control)
        estimates.restore(learned)
        planner = LocalityPlanner(view, estimates, self._router.journals, control, Abilities(published=True))
        loop = ControlLoop(
            view,
            ids=system_ids,
            epochs=epochs,
            settings=control,
            estimates=estimates,
            planner=planner,
            journals=self._router.journals,
        )
        metrics = Metrics()
        self._feed = Feed(view=view, live=self._router, database=database, status=self.status, settings=settings.admin.stream)
        starts = StartMeter(view, cluster.generation, metrics)
        rows = WatchedDatabase(database, metrics.estimated, self._feed.committed, starts.committed, timed=metrics.committed)
        self._runner = Runner(loop, LiveEffects(rows, self._links, self._router, self._assets, log), clock)
        metrics.add(lambda: cluster_gauges(view, self._router))
        metrics.add(lambda: decision_counts(loop.decisions.counts))
        metrics.add(lambda: self._router.engines.families(view.models))
        metrics.add(self._links.families)
        api = api_app(
            router=self._router,
            assets=self._assets,
            text=TextService(settings.gateway),
            settings=settings.gateway,
            status=self.status,
            metrics=metrics,
            hosts=None if settings.api.without_keys else (settings.api.host, *settings.api.hosts),
        )
        self._logs = Logs(view, self._links, settings.admin.logs)
        admin = admin_app(
            runner=self._runner,
            view=view,
            database=database,
            router=self._router,
            status=self.status,
            settings=settings.admin,
            explanations=Explanations(
                view=view,
                router=self._router,
                planner=planner,
                decisions=loop.decisions,
                estimates=estimates,
                database=database,
                clock=clock,
            ),
            feed=self._feed,
            logs=self._logs,
        )
        self._api_server = _Server(server_config(api, settings.gateway, metrics))
        self._admin_server = _Server(server_config(admin, settings.gateway, lifespan=False))

    def status(self) -> StatusView:
        """The manager itself, as it is now; ready when it serves and its local node is linked to it."""
        nodes = [node for node in self._view.nodes.values() if node.state is not NodeState.REMOVED]
        return StatusView(
            cluster=self._cluster.uuid,
            generation=self._cluster.generation,
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            api_url=self._api_url,
            ready=not self._stopping and self._links.is_up(self._settings.control.local_node),
            nodes_ready=sum(node.state is NodeState.READY for node in nodes),
            nodes=len(nodes),
        )

    async def serve(self, api_socket: socket, admin_socket: socket) -> None:
        """Run until a signal asks for the end or a part fails, whose error is raised once the rest has been stopped."""
        running = asyncio.get_running_loop()
        stop = asyncio.Event()
        parts = [
            asyncio.create_task(self._control(), name="control loop"),
            asyncio.create_task(self._admin_server.serve(sockets=[admin_socket]), name="admin API"),
            asyncio.create_task(self._api_server.serve(sockets=[api_socket]), name="API"),
            asyncio.create_task(self._meet_local_node(), name="local node"),
        ]
        asked = asyncio.create_task(stop.wait(), name="stop")
        with _signals(running, lambda: self._asked_to_stop(stop)), _heard(self._feed):
            try:
                await self._watch(parts, asked)
            finally:
                asked.cancel()
                await self._end(parts)
        parts[0].result()  # it may have failed while the rest was being stopped

    async def _control(self) -> None:
        """Run the control loop. When it fails, those who wait for a start are told that none will come."""
        try:
            await self._runner.run()
        except Exception:
            self._router.start_nothing(self._runner.why)
            raise

    async def _meet_local_node(self) -> None:
        """Adopt or make this machine's agent. Raises Conflict when it belongs to another manager."""
        node = self._settings.control.local_node
        self._runner.post(AddNode(node, node, self._local.address))
        self._links.connect(node, self._local.address)
        try:
            await self._links.ready(node, self._settings.serve.meet_agent_s)
        except (TimedOut, Unreachable) as error:
            # It may still come: the link is dialled for ever, and requests wait for it.
            log.warning("the local node is not there yet: %s", self._local.failure or error)
        else:
            log.info("ready; the API is at %s", self._api_url)

    async def _watch(self, parts: list[asyncio.Task[None]], asked: asyncio.Task[bool]) -> None:
        waiting: set[asyncio.Task[Any]] = {*parts, asked}
        while asked in waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for part in done - {asked}:
                part.result()
                if part.get_name() != "local node":
                    raise SllmError(f"the {part.get_name()} has ended by itself")

    def _asked_to_stop(self, stop: asyncio.Event) -> None:
        if stop.is_set():
            log.warning("asked again; not waiting for running requests")
            self._api_server.force_exit = True
        else:
            log.info("stopping: running requests have %g s", self._settings.gateway.drain_s)
        stop.set()

    async def _end(self, parts: list[asyncio.Task[None]]) -> None:
        """In the reverse order: no new requests, running ones drained, the node's processes, the loop, the admin API."""
        self._stopping = True
        loop, _, api, meeting = parts
        self._api_server.should_exit = True
        await asyncio.wait([api])
        meeting.cancel()
        if self._settings.serve.stop_agent and not loop.done():
            self._runner.post(Close())
            for killed in await self._local.shutdown(self._settings.serve.stop_agent_s):
                log.warning("had to kill %s", killed)
        await self._runner.stop()
        await self._assets.close()
        await self._links.close()
        await self._feed.close_feed()
        self._logs.close()
        self._admin_server.should_exit = self._admin_server.force_exit = True
        await asyncio.gather(*parts, return_exceptions=True)


@contextlib.contextmanager
def _signals(running: asyncio.AbstractEventLoop, ask: Callable[[], None]) -> Iterator[None]:
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, ask)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            running.remove_signal_handler(number)


@contextlib.contextmanager
def _heard(feed: Feed) -> Iterator[None]:
    """Whoever follows the event stream is told what the manager logs."""
    logging.getLogger().addHandler(feed)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(feed)


@contextlib.contextmanager
def _bound_admin(path: Path) -> Iterator[socket]:
    with bind_unix(path) as bound:
        try:
            yield bound
        finally:
            path.unlink(missing_ok=True)

"""Effects for real: rows to the database, words to nodes over their links, routes to the router."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from schema.link import ManagerMessage
from sllmctl.cluster.changes import RowChange
from sllmctl.control.effects import (
    CheckpointKnown,
    Connect,
    Effect,
    Log,
    Migrate,
    ModelChanged,
    RejectWaiting,
    RouteChanged,
    Send,
)

__all__ = ["AssetsPort", "DatabasePort", "LinksPort", "LiveEffects", "RouterPort"]


class DatabasePort(Protocol):
    async def commit(self, changes: Sequence[RowChange]) -> None: ...


class LinksPort(Protocol):
    def connect(self, node: str, address: str) -> None: ...
    def send(self, node: str, message: ManagerMessage) -> None: ...


class RouterPort(Protocol):
    def route_changed(self, effect: RouteChanged) -> None: ...
    def model_changed(self, effect: ModelChanged) -> None: ...
    def reject_waiting(self, effect: RejectWaiting) -> None: ...


class AssetsPort(Protocol):
    def known(self, digest: str, node: str) -> None: ...


class LiveEffects:
    """Carries effects out without waiting; each receiver bounds its own work. Implements `Effects`."""

    def __init__(
        self, database: DatabasePort, links: LinksPort, router: RouterPort, assets: AssetsPort, logger: logging.Logger
    ) -> None:
        self._database = database
        self._links = links
        self._router = router
        self._assets = assets
        self._logger = logger

    async def commit(self, changes: Sequence[RowChange]) -> None:
        await self._database.commit(changes)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(node, message):
                self._links.send(node, message)
            case RouteChanged():
                self._router.route_changed(effect)
            case ModelChanged():
                self._router.model_changed(effect)
            case RejectWaiting():
                self._router.reject_waiting(effect)
            case CheckpointKnown(digest, node):
                self._assets.known(digest, node)
            case Connect(node, address):
                self._links.connect(node, address)
            case Log(level, message):
                self._logger.log(logging.getLevelNamesMapping().get(level.upper(), logging.INFO), "%s", message)
            case Migrate():
                raise AssertionError("nodes cannot migrate yet: the planner's abilities must not include it")
            case _:
                raise AssertionError(f"{type(effect).__name__} is the runner's own to carry out")

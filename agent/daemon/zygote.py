"""The zygote's link: forks asked of it, its answers, and the exits of its children, handed to the instances."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from agent.daemon.connection import Connection
from agent.daemon.instances import Instances
from agent.daemon.supervisor import Kin
from schema.errors import LinkError
from schema.link import ChildExited, Forked, Hello, KeepSpares, Message, Welcome, ZygoteMessage, ZygoteTruth

__all__ = ["ZygoteLink"]

_log = logging.getLogger(__name__)


class ZygoteLink:
    """Speaks to the zygote over its lives. ``cuda``: the devices of which it keeps children with a context ready."""

    def __init__(self, kin: Kin, cuda: tuple[int, ...] = ()) -> None:
        self._kin = kin
        self._cuda = cuda
        self._stated = False
        self.instances: Instances | None = None

    @property
    def ready(self) -> bool:
        """True when the present zygote has stated its truth: it has imported all, and can fork."""
        return self._stated

    def welcome(self, connection: Connection, hello: Hello, welcome: Callable[[int], Welcome]) -> None:
        """A zygote has dialled. Raises Conflict for another than ours."""
        self._kin.claim(connection, hello.pid)
        self._stated = False
        connection.begin(ZygoteMessage, self, f"zygote (pid {hello.pid})")
        connection.send(welcome(0))

    def ask(self, message: Message) -> bool:
        """Say something to a zygote that has stated its truth; False when there is none."""
        return self._stated and self._kin.send(message)

    # --- Handler

    def received(self, connection: Connection, message: Any) -> None:
        assert self.instances is not None
        match message:
            case ZygoteTruth():
                if message.threads != 1:
                    _log.error("the zygote has %d threads; its forks may hang", message.threads)
                self._stated = True
                if self._cuda:
                    self._kin.send(KeepSpares(cuda=self._cuda))
                self.instances.zygote_ready()
            case _ if not self._stated:
                raise LinkError(f"the zygote said {type(message).__name__} before its truth")
            case Forked():
                self.instances.forked(message)
            case ChildExited():
                self.instances.child_exited(message.pid, message.status)
            case _:
                raise LinkError(f"the zygote has no {type(message).__name__} to say")

    def drained(self, connection: Connection) -> None:
        pass

    def lost(self, connection: Connection, why: str) -> None:
        if self._kin.disclaim(connection):
            self._stated = False
            _log.warning("the link to the zygote is lost: %s", why)

"""The typed client of the admin API: what can be asked, described once, and two thin transports that ask it.

`Call` is one request and how its answer is read; the functions of `calls` make them. `AdminClient` (for commands) and
`AsyncAdminClient` (for a dashboard) carry any Call over the manager's unix socket::

    with AdminClient(socket, settings) as admin:
        for model in admin.ask(models()): ...
        for frame in admin.follow(): ...

``follow`` is the event stream: a picture of the cluster, then what changes. Both raise the SllmError that the answer's body
names, and Unreachable when no manager can be asked: NoManager where one may still come, NoAnswer once that is waited for no
longer.
"""

from __future__ import annotations

from sllmctl.client import calls
from sllmctl.client.calls import *  # noqa: F403 - calls.__all__ is the one list of what can be asked
from sllmctl.client.transport import AdminClient, AsyncAdminClient, NoAnswer, NoManager

__all__ = ["AdminClient", "AsyncAdminClient", "NoAnswer", "NoManager"]
__all__ += calls.__all__

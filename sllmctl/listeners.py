"""The sockets that the manager listens on, bound before anything is started, so that what is taken is refused at once."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Any

from schema.errors import Conflict, InvalidInput
from sllmctl.config import SOCKET_PATH_BYTES

__all__ = ["bind_tcp", "bind_unix", "tcp_address"]


def bind_tcp(host: str, port: int, *, anywhere: bool = False) -> socket.socket:
    """A TCP socket listening on host and port (0: any).

    Raises Conflict when the port is taken, InvalidInput when the address is none of this machine's, or not a loopback
    address and ``anywhere`` is not set.
    """
    family, kind, protocol, _, address = tcp_address(host, port, anywhere=anywhere)
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        # Two sockets may bind one port with SO_REUSEADDR; only one may listen, so this is where a taken port shows.
        sock.listen(1024)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} on {host} is taken; stop what holds it or choose another with --port") from error
        raise InvalidInput(f"cannot listen on {host}:{port}: {error.strerror}", "api.host") from error
    sock.setblocking(False)
    return sock


def tcp_address(host: str, port: int, *, anywhere: bool = False) -> tuple[int, int, int, str, Any]:
    """What to make a socket of, as `socket.getaddrinfo` has it.

    Raises InvalidInput for a name that is none, and for an address beyond loopback unless ``anywhere`` is set.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise InvalidInput(f"cannot listen on {host}: {error.strerror}", "api.host") from error
    if not anywhere and not ipaddress.ip_address(found[4][0]).is_loopback:
        raise InvalidInput(
            f"the API asks for no key, so it does not listen on {host}; use a loopback address behind a proxy, "
            "or set api.without_keys if whoever reaches it may use it",
            "api.host",
        )
    return found


def bind_unix(path: Path) -> socket.socket:
    """A listening unix socket of mode 0600 at ``path``; a stale one left by a crash is replaced.

    Raises Conflict when somebody answers on it or it is no socket, InvalidInput when the path is too long or its directory
    cannot be written.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise InvalidInput(f"the socket path {path} is longer than {SOCKET_PATH_BYTES} bytes; choose a shorter state directory")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise InvalidInput(f"cannot listen on {path}: {error.strerror}") from error
    except Conflict:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict(f"{path} exists and is not a socket; move it away")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)
                return
            raise Conflict(f"another manager answers on {path}; stop it, or give this one a state directory of its own")

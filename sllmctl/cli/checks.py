"""What `sllmctl doctor` looks at, each a function of the settings that returns findings and changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from schema.admin import StatusView
from schema.errors import SllmError
from schema.version import VERSION
from sllmctl.cli.clock_checks import check_clock
from sllmctl.cli.cluster_checks import check_cluster
from sllmctl.cli.findings import Finding, existing, meminfo
from sllmctl.cli.format import size
from sllmctl.cli.machine_checks import cuda, cuda_facts, listeners, port, port_error
from sllmctl.cli.process_checks import check_processes, group_of, process_facts
from sllmctl.cli.state_checks import check_state
from sllmctl.cli.store_checks import check_store
from sllmctl.config import Settings
from sllmctl.nodes.local import missing_node_packages, node_processes

__all__ = ["Finding", "check_machine", "check_python", "socket_state"]

_PYTHON_FROM, _PYTHON_BELOW = (3, 11), (3, 14)
_NODE_PACKAGES = ("torch", "transformers", "huggingface-hub", "numpy", "xxhash")
_DISK_FAULT_BYTES, _DISK_WARN_BYTES = 1 << 30, 10 << 30
_SHM = Path("/dev") / "shm"
_SHM_WARN_BYTES = 64 << 20
_PROBE_S = 1.0


def check_python() -> Iterator[Finding]:
    """The interpreter, and the packages that a node needs beside the manager's own."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if _PYTHON_FROM <= sys.version_info[:2] < _PYTHON_BELOW:
        yield Finding("python", "ok", f"Python {version}")
    else:
        yield Finding("python", "fault", f"Python {version} is not supported", "use Python 3.11 to 3.13")
    found, missing = [], []
    for name in _NODE_PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        advice = "install sllmctl[node] if this machine is to run models"
        yield Finding("packages", "warn", f"not installed: {', '.join(missing)}", advice)
    else:
        yield Finding("packages", "ok", ", ".join(found))


def check_machine(settings: Settings, file: Path | None = None) -> Iterator[Finding]:
    """Everything else: the state directory, the manager, the node, its processes, memory, disk, clock.

    ``file`` is the configuration that was read, if any. What only a manager knows is left out where none answers.
    """
    yield _state_dir(settings.state_dir)
    manager = socket_state(settings.admin_socket)
    view = _status(settings) if manager == "answers" else None
    status = view if isinstance(view, StatusView) else None
    yield _manager(settings, manager, view)
    if status is not None:
        yield _versions(status.version)
    yield _agent(Path(settings.node.run_dir) / "agent.sock", manager)
    if manager != "answers":
        number = settings.api.port
        yield port(settings.api.host, number, port_error(settings.api.host, number), listeners(number) if number else ())
    yield from check_state(settings, file, running=manager == "answers")
    yield _memory(settings.node.arena_bytes)
    yield _shared_memory()
    ours = [("manager", status.pid)] if status is not None else []
    yield from check_processes(process_facts([*ours, *node_processes(Path(settings.node.run_dir))]))
    yield cuda(cuda_facts())
    yield _disk(Path(settings.node.data_dir))
    yield from check_clock(settings.state_dir, (status.pid, status.started_at) if status is not None else None)
    yield from check_store(settings, running=manager == "answers")
    if manager == "answers":
        yield from check_cluster(settings)


def socket_state(path: Path) -> Literal["absent", "stale", "answers", "denied", "odd"]:
    """Who is behind a unix socket: nobody left it, somebody died, somebody listens, not ours to use, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return "odd"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect(str(path))
    except FileNotFoundError:
        return "absent"
    except ConnectionRefusedError:
        return "stale"
    except PermissionError:
        return "denied"
    except (OSError, TimeoutError):
        return "odd"
    return "answers"


def _state_dir(path: Path) -> Finding:
    above = existing(path)
    if above.exists() and not above.is_dir():
        return Finding("state_dir", "fault", f"{above} is not a directory", "move it away, or set state_dir")
    if not os.access(above, os.W_OK | os.X_OK):
        advice = "run sllmctl as its owner, or set state_dir (--state-dir, SLLM_STATE_DIR)"
        return Finding("state_dir", "fault", f"{above} cannot be written by this user", advice)
    if above != path:
        return Finding("state_dir", "ok", f"{path} is made at the first start")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        return Finding("state_dir", "warn", f"{path} can be written by other users ({mode:o})", f"chmod 700 {path}")
    return Finding("state_dir", "ok", f"{path} ({mode:o})")


def _manager(settings: Settings, state: str, view: StatusView | SllmError | None) -> Finding:
    path = settings.admin_socket
    match state:
        case "absent":
            return Finding("manager", "warn", "no manager runs", "start it with `sllmctl serve`")
        case "stale":
            return Finding("manager", "warn", f"a manager died and left {path}", "start it again with `sllmctl serve`")
        case "denied":
            return Finding("manager", "fault", f"{path} is another user's", "run sllmctl as the user that runs the manager")
        case "odd":
            return Finding("manager", "fault", f"{path} is no socket that answers", "move it away, then `sllmctl serve`")
    if isinstance(view, SllmError):
        return Finding("manager", "fault", str(view), "see its log; restart it if it stays so")
    assert view is not None
    text = f"version {view.version}, pid {view.pid}, {view.nodes_ready} of {view.nodes} nodes ready, API at {view.api_url}"
    if not view.ready:
        return Finding("manager", "warn", f"not ready: {text}", "`sllmctl node ls` and `sllmctl event ls` say why")
    return Finding("manager", "ok", text)


def _status(settings: Settings) -> StatusView | SllmError:
    from sllmctl.client import AdminClient, status

    try:
        with AdminClient(settings.admin_socket, settings.client) as admin:
            return admin.ask(status())
    except SllmError as error:
        return error


def _versions(manager: str) -> Finding:
    """Commands of another version may ask for what this manager does not know."""
    if manager != VERSION:
        text = f"the manager runs version {manager}, these commands are version {VERSION}"
        return Finding("versions", "warn", text, "restart the manager with this build, or call the build that it runs from")
    return Finding("versions", "ok", f"manager and commands are version {VERSION}")


def _agent(path: Path, manager: str) -> Finding:
    match socket_state(path):
        case "answers":
            return Finding("agent", "ok", f"answers at {path}")
        case "absent" if missing_node_packages():
            text = "none runs; what a node needs is not installed with this sllmctl, so it is a manager alone"
            return Finding("agent", "warn", text, "to run models on this machine install it with `./install.sh`")
        case "absent" if manager != "answers":
            return Finding("agent", "ok", "not running; the manager starts it")
        case "denied":
            return Finding("agent", "fault", f"{path} is another user's", "run the manager as the user that runs the agent")
        case "odd":
            return Finding("agent", "fault", f"{path} is no socket that answers", "move it away, and restart the manager")
        case "stale" if manager != "answers":
            return Finding("agent", "warn", f"an agent died and left {path}", "the next `sllmctl serve` makes it again")
    return Finding("agent", "fault", "the agent of this machine does not run", "see `sllmctl event ls` and the manager's log")


def _memory(arena_bytes: int) -> Finding:
    room = meminfo().get("MemAvailable", 0)
    group = group_of(os.getpid()).memory_room_bytes
    if group is not None:
        room = min(room, group)
    if room < arena_bytes:
        text = f"{size(room)} of memory available, less than the arena's {size(arena_bytes)}"
        return Finding("memory", "warn", text, "set node.arena_bytes lower, or free memory (an arena in use counts as taken)")
    return Finding("memory", "ok", f"{size(room)} available for an arena of {size(arena_bytes)}")


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as error:
        return Finding("shm", "warn", f"{_SHM} cannot be used: {error.strerror}", "mount a tmpfs there")
    if free < _SHM_WARN_BYTES or not os.access(_SHM, os.W_OK):
        return Finding("shm", "warn", f"{_SHM} has {size(free)} free", "remove what fills it, or mount it larger and writable")
    return Finding("shm", "ok", f"{size(free)} free in {_SHM}")


def _disk(path: Path) -> Finding:
    path = existing(path)
    free = shutil.disk_usage(path).free
    text = f"{size(free)} free for checkpoints at {path}"
    if free < _DISK_FAULT_BYTES:
        return Finding("disk", "fault", text, "free some, or set node.data_dir to a larger disk")
    if free < _DISK_WARN_BYTES:
        return Finding("disk", "warn", text, "models of a few billion parameters will not fit")
    return Finding("disk", "ok", text)

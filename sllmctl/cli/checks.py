"""What `sllmctl doctor` looks at, each a function of the settings that returns findings and changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

from schema.admin import NodeView
from schema.errors import InvalidInput, Unreachable
from schema.nodesettings import NodeSettings
from schema.states import NodeState
from schema.version import VERSION
from sllmctl.cli.clock_checks import check_clock
from sllmctl.cli.cluster_checks import check_cluster
from sllmctl.cli.findings import Finding, existing, meminfo
from sllmctl.cli.format import printable, size
from sllmctl.cli.looks import Check, Look, hung, look_in_time
from sllmctl.cli.machine_checks import cuda, cuda_facts, listeners, port, port_error
from sllmctl.cli.process_checks import check_processes, group_of
from sllmctl.cli.state_checks import check_state
from sllmctl.cli.store_checks import arena_pages, check_store
from sllmctl.cli.told import ANSWER_S, Told, ask
from sllmctl.config import ApiSettings, Settings
from sllmctl.nodes.local import missing_node_packages, need_memory, node_processes

__all__ = ["Finding", "check_machine", "check_python", "socket_state"]

T = TypeVar("T")
_PYTHON_FROM, _PYTHON_BELOW = (3, 11), (3, 14)
_NODE_PACKAGES = ("torch", "transformers", "huggingface-hub", "numpy", "xxhash")
_DISK_FAULT_BYTES, _DISK_WARN_BYTES = 1 << 30, 10 << 30
_SHM = Path("/dev") / "shm"
_SHM_WARN_BYTES = 64 << 20
_PROBE_S = 1.0
_TO_RUN_MODELS = "to run models on this machine install sllmctl from its sources with `./install.sh`"


def check_python() -> Iterator[Finding]:
    """The interpreter, the packages that a node needs beside the manager's own, and what is compiled of them."""
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
        yield Finding("packages", "warn", f"not installed: {', '.join(missing)}", _TO_RUN_MODELS)
        return
    yield Finding("packages", "ok", ", ".join(found))
    if importlib.util.find_spec("agent.native._compiled") is not None:
        yield Finding("compiled", "ok", "the code that generates on processors is compiled")
    elif platform.machine() == "x86_64":
        text = "the code that generates on processors was not compiled: torch does it, in more time"
        yield Finding("compiled", "warn", text, "install gcc 11 or newer, then run ./install.sh again")


def check_machine(settings: Settings, file: Path | None = None) -> Iterator[Finding]:
    """Everything else: the state directory, the manager, the node, its processes, memory, disk, clock.

    ``file`` is the configuration that was read, if any. What only a manager knows is left out where none answers.
    """
    run, data = Path(settings.node.run_dir), Path(settings.node.data_dir)
    door, listed = Look[str](lambda: socket_state(settings.admin_socket)), Look(lambda: node_processes(run))
    manager, processes = _answer(door, "hung"), _answer(listed, [])
    told = ask(settings) if manager == "answers" else Told()
    status, pids = told.status, dict(processes)
    checks: list[Check] = [
        ("state_dir", lambda: _state_dir(settings.state_dir)),
        ("data_dir", lambda: _data_dir(settings.state_dir, run, data)),
        ("manager", lambda: _manager(settings.admin_socket, manager, told)),
    ]
    if status is not None:
        checks.append(("versions", lambda: _versions(status.version)))
    checks.append(("agent", lambda: _agent(run / "agent.sock", manager, told.local, pids.get("agent"))))
    if manager not in ("answers", "hung"):
        checks.append(("port", lambda: _port(settings.api)))
    checks += check_state(settings, file, running=manager == "answers")
    checks += [
        ("memory", lambda: _memory(settings.node, told.local, pids.get("store"))),
        ("shm", _shared_memory),
        *check_processes([*([("manager", status.pid)] if status is not None else []), *processes]),
        ("cuda", lambda: cuda(cuda_facts())),
        ("disk", lambda: _disk(data)),
        *check_clock(settings.state_dir, (status.pid, status.started_at) if status is not None else None),
        *check_store(settings, told),
    ]
    yield from look_in_time(checks)
    if status is not None and told.error is None:
        yield from check_cluster(told)


def _answer(look: Look[T], otherwise: T) -> T:
    """What was found; ``otherwise`` where that hangs, which is the finding of a check that looks there too."""
    try:
        return look.get()
    except TimeoutError:
        return otherwise


def socket_state(path: Path) -> Literal["absent", "stale", "answers", "denied", "odd"]:
    """Who is behind a unix socket: nobody left it, somebody died, somebody listens, not ours to use, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return "odd"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect(str(path))
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except ConnectionRefusedError:
        return "stale"
    except PermissionError:
        return "denied"
    except (BlockingIOError, TimeoutError):
        return "answers"  # somebody listens, and is behind with taking connections
    except OSError:
        return "odd"
    return "answers"


def _state_dir(path: Path) -> Finding:
    in_the_way = _in_the_way(path, "state_dir (--state-dir, SLLM_STATE_DIR)")
    if in_the_way is not None:
        return Finding("state_dir", "fault", *in_the_way)
    if existing(path) != path:
        return Finding("state_dir", "ok", f"{path} is made at the first start")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        return Finding("state_dir", "warn", f"{path} can be written by other users ({mode:o})", f"`chmod go-w {path}`")
    return Finding("state_dir", "ok", f"{path} ({mode:o})")


def _data_dir(state: Path, run: Path, data: Path) -> Finding:
    """Those that are not there yet lie in what the state directory's own finding is about, unless they are set."""
    for path, setting in ((data, "node.data_dir"), (run, "node.run_dir")):
        in_the_way = _in_the_way(path, setting)
        if in_the_way is not None and existing(path) != existing(state):
            return Finding("data_dir", "fault", *in_the_way)
    return Finding("data_dir", "ok", f"checkpoints in {data}" + (f", sockets in {run}" if run != data else ""))


def _in_the_way(path: Path, setting: str) -> tuple[str, str] | None:
    """Why this user cannot write there, and what to do; None where it can."""
    above = existing(path)
    if not above.is_dir():
        return f"{above} is not a directory", f"move it away, or set {setting}"
    if os.access(above, os.W_OK | os.X_OK):
        return None
    where = shlex.quote(str(above))
    if os.statvfs(above).f_flag & os.ST_RDONLY:
        text = f"{above} lies on a file system that is mounted read-only"
        return text, f'`sudo mount -o remount,rw "$(findmnt -no TARGET -T {where})"`, or set {setting}'
    owner = above.stat().st_uid
    if owner == os.geteuid():
        return f"{above} cannot be written by its owner, this user", f"`chmod u+rwx {where}`"
    return f"{above} is user {owner}'s and cannot be written by this one", f"run sllmctl as its owner, or set {setting}"


def _manager(path: Path, state: str, told: Told) -> Finding:
    match state:
        case "hung":
            return hung("manager")
        case "absent":
            return Finding("manager", "warn", "no manager runs", "start it with `sllmctl serve`")
        case "stale":
            return Finding("manager", "warn", f"a manager died and left {path}", "start it again with `sllmctl serve`")
        case "denied":
            return Finding("manager", "fault", f"{path} is another user's", "run sllmctl as the user that runs the manager")
        case "odd":
            return Finding("manager", "fault", f"{path} is no socket that answers", "move it away, then `sllmctl serve`")
    if isinstance(told.error, Unreachable):
        text = f"nobody answers at {path}, though something listens there ({ANSWER_S:g} s are waited)"
        return Finding("manager", "fault", text, "see the manager's log; end it and start it again if it stays so")
    if told.error is not None:
        return Finding("manager", "fault", printable(str(told.error)), "see its log; restart it if it stays so")
    view = told.status
    assert view is not None
    text = f"version {view.version}, pid {view.pid}, {view.nodes_ready} of {view.nodes} nodes ready, API at {view.api_url}"
    if not view.ready:
        return Finding("manager", "warn", f"not ready: {text}", "`sllmctl node ls` and `sllmctl event ls` say why")
    return Finding("manager", "ok", text)


def _versions(manager: str) -> Finding:
    """Commands of another version may ask for what this manager does not know."""
    if manager != VERSION:
        text = f"the manager runs version {manager}, these commands are version {VERSION}"
        return Finding("versions", "warn", text, "restart the manager with this build, or call the build that it runs from")
    return Finding("versions", "ok", f"manager and commands are version {VERSION}")


def _agent(path: Path, manager: str, local: NodeView | None, pid: int | None) -> Finding:
    """``local`` is the node as the manager sees it; ``pid`` its agent's, where it runs."""
    match socket_state(path):
        case "answers" if local is not None and local.state is NodeState.UNREACHABLE:
            text = f"something listens at {path}, but the manager has lost the node and does not reach it"
            ends = f"`kill -9 {pid}` ends the agent" if pid is not None else "end the agent"
            advice = f"see `sllmctl event ls` and the agent's log; if it stays so, {ends}: the manager starts another"
            return Finding("agent", "fault", text, f"{advice}, and what is loaded stays")
        case "answers":
            return Finding("agent", "ok", f"answers at {path}")
        case "absent" if missing_node_packages():
            text = "none runs; what a node needs is not installed with this sllmctl, so it is a manager alone"
            return Finding("agent", "warn", text, _TO_RUN_MODELS)
        case "absent" if manager != "answers":
            return Finding("agent", "ok", "not running; the manager starts it")
        case "denied":
            return Finding("agent", "fault", f"{path} is another user's", "run the manager as the user that runs the agent")
        case "odd":
            return Finding("agent", "fault", f"{path} is no socket that answers", "move it away, and restart the manager")
        case "stale" if manager != "answers":
            return Finding("agent", "warn", f"an agent died and left {path}", "the next `sllmctl serve` makes it again")
    return Finding("agent", "fault", "the agent of this machine does not run", "see `sllmctl event ls` and the manager's log")


def _port(api: ApiSettings) -> Finding:
    error = port_error(api.host, api.port, anywhere=api.without_keys)
    return port(api.host, api.port, error, listeners(api.port) if api.port else ())


def _memory(node: NodeSettings, local: NodeView | None, store: int | None) -> Finding:
    """Memory for the arena beside what it has already, within the control groups of the ``store`` (a pid) if that runs."""
    try:
        need_memory(node)
    except InvalidInput as error:
        return Finding("memory", "fault", str(error), "`sllmctl serve` refuses it")
    if arena_pages(node.arena_bytes, local) == "hugetlb":
        return Finding(
            "memory", "ok", f"an arena of {size(node.arena_bytes)} lies in the pool of huge pages, which is set aside"
        )
    room = meminfo().get("MemAvailable", 0)
    group = group_of(os.getpid() if store is None else store).memory_room_bytes
    if group is not None:
        room = min(room, group)
    has = local.inventory.arena.faulted_bytes if local is not None and local.inventory is not None else 0
    if room < node.arena_bytes - has:
        text = f"{size(room)} of memory available, less than the arena's {size(node.arena_bytes)}"
        if has:
            text += f", of which it has {size(has)}"
        return Finding("memory", "warn", text, "set node.arena_bytes lower, or free memory")
    return Finding("memory", "ok", f"{size(room)} available for an arena of {size(node.arena_bytes)}")


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage(_SHM).free
    except OSError as error:
        return Finding("shm", "warn", f"{_SHM} cannot be used: {error.strerror}", "mount a tmpfs there")
    if not os.access(_SHM, os.W_OK):
        return Finding("shm", "warn", f"{_SHM} cannot be written by this user", f"`sudo mount -o remount,rw,mode=1777 {_SHM}`")
    if free < _SHM_WARN_BYTES:
        return Finding(
            "shm", "warn", f"{_SHM} has {size(free)} free", f"remove what fills it, or `sudo mount -o remount,size=50% {_SHM}`"
        )
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

"""What `sllmctl doctor` looks at in what the machine offers others too: who holds a port, and what there is of CUDA."""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from schema.errors import InvalidInput
from sllmctl.cli.findings import Finding, read_text
from sllmctl.listeners import tcp_address

__all__ = ["Cuda", "cuda", "cuda_facts", "listeners", "port", "port_error"]

_LISTEN = "0A"


class Cuda(msgspec.Struct, frozen=True):
    """``driver`` is the newest CUDA that it speaks, (0, 0) where its library cannot be loaded; ``bindings`` are a version."""

    devices: int = 0
    module: str = ""
    driver: tuple[int, int] = (0, 0)
    bindings: str = ""


def port(host: str, number: int, error: OSError | InvalidInput | None, holders: Sequence[str]) -> Finding:
    """``error``: why it cannot be listened on; ``holders``: who does, as far as this user may see."""
    where = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
    if error is None:
        return Finding("port", "ok", f"{where} is free")
    if isinstance(error, InvalidInput):
        return Finding("port", "fault", str(error), "set api.host (--host)")
    if error.errno == errno.EADDRINUSE:
        who = ", ".join(holders) or "a process that this user may not look at"
        advice = f"`sudo ss -ltnp 'sport = :{number}'` names it; stop it, or set api.port (--port)"
        return Finding("port", "fault", f"{where} is taken by {who}", advice)
    return Finding("port", "fault", f"cannot listen on {where}: {error.strerror}", "set api.host and api.port")


def port_error(host: str, number: int, *, anywhere: bool) -> OSError | InvalidInput | None:
    """What a manager would meet that listens there now; ``anywhere``: also beyond loopback."""
    try:
        family, kind, protocol, _, address = tcp_address(host, number, anywhere=anywhere)
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, InvalidInput) as error:
        return error
    return None


def listeners(number: int) -> list[str]:
    """Processes that listen on this TCP port, as "name (pid 12)": those whose descriptors this user may read."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in read_text(Path("/proc/net") / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == number:
                inodes.add(f"socket:[{fields[9]}]")
    found = []
    for directory in Path("/proc").glob("[0-9]*/fd") if inodes else ():
        try:
            if any(str(entry.readlink()) in inodes for entry in directory.iterdir()):
                name = read_text(directory.parent / "comm").strip()
                found.append(f"{name} (pid {directory.parent.name})")
        except OSError:
            continue  # another user's, or it has ended
    return found


def cuda_facts() -> Cuda:
    """Of devices, kernel module, driver library and bindings; nothing is initialised."""
    version = ctypes.c_int()
    driver = (0, 0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            driver = (version.value // 1000, version.value % 1000 // 10)
    except (OSError, AttributeError):
        pass
    try:
        bindings = importlib.metadata.version("cuda-bindings")
    except importlib.metadata.PackageNotFoundError:
        bindings = ""
    module = re.search(r"Module\s+([\d.]+)", read_text(Path("/proc/driver/nvidia/version")))
    devices = sum(1 for path in Path("/dev").glob("nvidia[0-9]*"))
    return Cuda(devices, module.group(1) if module else "", driver, bindings)


def cuda(facts: Cuda) -> Finding:
    """Bindings speak to a driver of their own major version or a newer one."""
    if not facts.devices:
        return Finding("cuda", "ok", "this machine has no NVIDIA device; models run on its processors")
    text = f"devices: {facts.devices}, kernel module {facts.module or 'unknown'}"
    if facts.driver == (0, 0):
        advice = "install the driver's libraries of the module's version (`nvidia-smi` must work), then restart the node"
        return Finding("cuda", "fault", f"{text}; the driver's library (libcuda.so.1) cannot be loaded", advice)
    text += f", driver for CUDA {facts.driver[0]}.{facts.driver[1]}"
    install = f"`pip install 'cuda-bindings<{facts.driver[0] + 1}'` in sllmctl's environment"
    if not facts.bindings:
        advice = f"{install}; until then models run on the processors"
        return Finding("cuda", "warn", f"{text}; no CUDA bindings are installed", advice)
    text += f", bindings {facts.bindings}"
    if int(facts.bindings.partition(".")[0]) > facts.driver[0]:
        advice = f"{install}, or install a newer driver"
        return Finding("cuda", "fault", f"{text}: newer than the driver", advice)
    return Finding("cuda", "ok", text)

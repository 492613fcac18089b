"""What `sllmctl doctor` looks at in our processes and what the kernel allows them: files, memory, control groups, zombies."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sllmctl.cli.findings import Finding, read_text
from sllmctl.cli.format import size
from sllmctl.cli.looks import Check, Look
from sllmctl.procstat import process_stat

__all__ = [
    "Group",
    "Process",
    "cgroup",
    "check_processes",
    "group_of",
    "oom",
    "open_files",
    "process_facts",
    "swap",
    "thp",
    "zombies",
]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_FILES_FEW = 4096
_FULL = 0.8
_SWAP_WARN_BYTES = 64 << 20


class Process(msgspec.Struct, frozen=True):
    """One of ours as the kernel sees it; ``zombies`` are the pids of its children that have ended and were not collected."""

    role: str
    pid: int
    open_files: int = 0
    files_limit: int = 0
    swap_bytes: int = 0
    oom_adj: int = 0
    zombies: tuple[int, ...] = ()


class Group(msgspec.Struct, frozen=True):
    """The control groups of a process, from its own up to the root: the tightest limits, None where there is none.

    ``known`` is false where they are of the first version, or none, and so nothing of them can be told.
    """

    memory_room_bytes: int | None = None
    memory_limit_bytes: int | None = None
    pids_limit: int | None = None
    pids: int = 0
    oom_kills: int = 0
    known: bool = True


def check_processes(named: Sequence[tuple[str, int]]) -> list[Check]:
    """Checks of the manager's and the node's processes on this machine, of those of these (role, pid) that run."""
    facts = Look(lambda: process_facts(named))
    return [
        ("cgroup", lambda: cgroup(group_of(next((each.pid for each in facts.get()), os.getpid())))),
        ("swap", lambda: swap(facts.get())),
        ("oom", lambda: oom(facts.get())),
        ("thp", lambda: thp(read_text(_THP / "enabled"), read_text(_THP / "defrag"))),
        ("open_files", lambda: open_files(facts.get(), resource.getrlimit(resource.RLIMIT_NOFILE))),
        ("zombies", lambda: zombies(facts.get())),
    ]


def process_facts(named: Sequence[tuple[str, int]], proc: Path = _PROC) -> list[Process]:
    """What can be read of these (role, pid); of another user's processes that is less. Those that have ended are left out."""
    ended: dict[int, list[int]] = {}
    for path in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = process_stat(int(path.name), proc)
            if stat.state == "Z":
                ended.setdefault(stat.parent, []).append(int(path.name))
    found = []
    for role, pid in named:
        status = read_text(proc / str(pid) / "status")
        if not status:
            continue
        swapped = re.search(r"^VmSwap:\s+(\d+) kB", status, re.MULTILINE)
        limit = re.search(r"^Max open files\s+(\d+)", read_text(proc / str(pid) / "limits"), re.MULTILINE)
        found.append(
            Process(
                role=role,
                pid=pid,
                open_files=_count(proc / str(pid) / "fd"),
                files_limit=int(limit.group(1)) if limit else 0,
                swap_bytes=int(swapped.group(1)) * 1024 if swapped else 0,
                oom_adj=int(read_text(proc / str(pid) / "oom_score_adj") or 0),
                zombies=tuple(sorted(ended.get(pid, ()))),
            )
        )
    return found


def group_of(pid: int, proc: Path = _PROC, root: Path = _CGROUPS) -> Group:
    """Of the second version of control groups. What the kernel keeps of files is room, since it gives that up first."""
    if not (root / "cgroup.controllers").exists():
        return Group(known=False)
    line = next((line for line in read_text(proc / str(pid) / "cgroup").splitlines() if line.startswith("0::")), "0::/")
    path = root / line[3:].strip("/")
    rooms, limits, found = [], [], Group()
    own = path if path.is_dir() else root  # in a container the path may be the host's
    for level in (own, *(above for above in own.parents if above == root or root in above.parents)):
        limit = _number(level / "memory.max")
        if limit is not None:
            limits.append(limit)
            rooms.append(max(0, limit - (_number(level / "memory.current") or 0) + _files_bytes(level)))
        pids_limit = _number(level / "pids.max")
        if pids_limit is not None and (found.pids_limit is None or pids_limit < found.pids_limit):
            found = msgspec.structs.replace(found, pids_limit=pids_limit, pids=_number(level / "pids.current") or 0)
    kills = re.search(r"^oom_kill (\d+)", read_text(own / "memory.events"), re.MULTILINE)
    return msgspec.structs.replace(
        found,
        memory_room_bytes=min(rooms, default=None),
        memory_limit_bytes=min(limits, default=None),
        oom_kills=int(kills.group(1)) if kills else 0,
    )


def cgroup(group: Group) -> Finding:
    """A group that has already killed for memory, or may hardly start another process."""
    if not group.known:
        return Finding("cgroup", "ok", "not known: this machine has no control groups of the second version")
    limit = "no memory limit" if group.memory_limit_bytes is None else f"memory limit {size(group.memory_limit_bytes)}"
    if group.pids_limit is not None and group.pids > _FULL * group.pids_limit:
        text = f"{group.pids} of {group.pids_limit} processes and threads that the control group allows"
        return Finding("cgroup", "fault", text, "TasksMax=infinity in the service, or --pids-limit=-1 of the container")
    if group.oom_kills:
        text = f"the kernel has killed {group.oom_kills} processes of this control group for memory ({limit})"
        advice = "raise MemoryMax of the service (or the container's --memory), or set node.arena_bytes lower"
        return Finding("cgroup", "warn", text, advice)
    return Finding("cgroup", "ok", f"{limit}; nothing was killed for memory")


def swap(processes: Sequence[Process]) -> Finding:
    """Weights and caches that have been swapped out come back from a disk in the middle of a token."""
    out = [each for each in processes if each.swap_bytes > _SWAP_WARN_BYTES]
    if not out:
        return Finding("swap", "ok", "nothing of ours has been swapped out" if processes else "nothing of ours runs")
    text = ", ".join(f"{size(each.swap_bytes)} of {each.role} {each.pid}" for each in out)
    advice = "`sudo swapoff -a && sudo swapon -a` brings it back; MemorySwapMax=0 in the service keeps it in"
    return Finding("swap", "warn", f"swapped out: {text}", advice)


def oom(processes: Sequence[Process]) -> Finding:
    """A manager or store that the kernel prefers to others when it must kill. Workers may: their requests go on elsewhere."""
    first = [each for each in processes if each.oom_adj > 0 and not each.role.startswith("worker")]
    if not first:
        return Finding("oom", "ok", "the kernel would not kill ours before others" if processes else "nothing of ours runs")
    text = ", ".join(f"{each.role} {each.pid} ({each.oom_adj:+d})" for each in first)
    commands = "; ".join(f"echo 0 | sudo tee /proc/{each.pid}/oom_score_adj" for each in first)
    return Finding(
        "oom", "warn", f"killed before others when memory runs out: {text}", f"`{commands}`; OOMScoreAdjust= of a service"
    )


def thp(enabled: str, defrag: str) -> Finding:
    """Both at "always", any process may stop while the kernel moves memory to make a huge page for it."""
    if not enabled:
        return Finding("thp", "ok", "this kernel has no transparent huge pages")
    if "[always]" in enabled and "[always]" in defrag:
        advice = f"`echo defer+madvise | sudo tee {_THP}/defrag`"
        return Finding("thp", "warn", "the kernel stops processes to make huge pages for them (defrag is always)", advice)
    chosen = [re.sub(r".*\[(.*)\].*", r"\1", text.strip()) for text in (enabled, defrag)]
    return Finding("thp", "ok", f"transparent huge pages: {chosen[0]}, defrag {chosen[1]}")


def open_files(processes: Sequence[Process], own: tuple[int, int]) -> Finding:
    """Every stream to a client is a file. ``own``: the limits of this command, which a manager started like it would have."""
    full = [each for each in processes if each.files_limit and each.open_files > _FULL * each.files_limit]
    if full:
        text = ", ".join(f"{each.role} {each.pid} has {each.open_files} of {each.files_limit}" for each in full)
        commands = "; ".join(f"sudo prlimit --pid {each.pid} --nofile={each.files_limit * 8}" for each in full)
        advice = f"`{commands}`; then LimitNOFILE= of the service"
        return Finding("open_files", "fault", f"hardly another file can be opened: {text}", advice)
    manager = next((each for each in processes if each.role == "manager" and each.files_limit), None)
    limit, whose = (own[0], "this shell's") if manager is None else (manager.files_limit, "the manager's")
    if limit < _FILES_FEW and limit != resource.RLIM_INFINITY:
        most = min(65536, own[1]) if own[1] != resource.RLIM_INFINITY else 65536
        advice = f"`ulimit -n {most}` before `sllmctl serve`, or LimitNOFILE=65536 in the service"
        text = f"{whose} limit is {limit} open files, and each stream to a client is one"
        return Finding("open_files", "warn", text, advice)
    text = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    return Finding("open_files", "ok", f"{whose} limit of open files: {text}")


def zombies(processes: Sequence[Process]) -> Finding:
    """A moment's zombie is none; they are looked for once, so a busy machine may show one that is just being collected."""
    bad = [each for each in processes if each.zombies]
    if not bad:
        return Finding("zombies", "ok", "no child of ours waits to be collected" if processes else "nothing of ours runs")
    text = "; ".join(f"{', '.join(map(str, each.zombies))} of {each.role} {each.pid}" for each in bad)
    commands = "; ".join(f"kill {each.pid}" for each in bad)
    advice = f"look again; if they stay, `{commands}` ends the parent, which is started again (the manager by you)"
    return Finding("zombies", "warn", f"ended and not collected: {text}", advice)


def _files_bytes(group: Path) -> int:
    return sum(int(each) for each in re.findall(r"^(?:in)?active_file (\d+)$", read_text(group / "memory.stat"), re.MULTILINE))


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def _count(directory: Path) -> int:
    try:
        return len(os.listdir(directory))  # noqa: PTH208
    except OSError:
        return 0

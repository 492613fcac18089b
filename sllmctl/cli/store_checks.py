"""What `sllmctl doctor` looks at for the checkpoint store: pages, locks, the kernel's reads, the disk. It changes nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sllmctl.cli.findings import Finding, existing, read_text
from sllmctl.cli.format import bandwidth, duration, size
from sllmctl.cli.looks import Check

if TYPE_CHECKING:
    from schema.admin import CheckpointView, ModelView, NodeView
    from sllmctl.cli.told import Told
    from sllmctl.config import Settings

__all__ = ["arena_pages", "check_store", "disk_start", "huge_pages_needed", "load_times"]

_HUGE_BYTES = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
_SYS_IO_URING_SETUP = 425
_URING_PARAMS_BYTES = 120
_FULL = 0.9
_NAMED = 5


def check_store(settings: Settings, told: Told) -> list[Check]:
    """Checks of this machine, and of its node and what is deployed, where a manager told of them."""
    local, node, data, base_s = told.local, settings.node, Path(settings.node.data_dir), settings.control.start_base_s
    checks: list[Check] = [
        ("arena_pages", lambda: _arena_pages(node.arena_bytes, local)),
        ("huge_pages", lambda: _pool(node.arena_bytes, local)),
        ("memlock", lambda: _memlock(node.arena_bytes)),
        ("io_uring", _io_uring),
        ("direct_reads", lambda: _direct_reads(data)),
        ("disk_budget", lambda: _disk_budget(node.disk_bytes, data, local)),
    ]
    if local is not None:
        checks += [
            ("disk_start", lambda: disk_start(local, told.models, told.checkpoints, told.learned, base_s)),
            ("load_times", lambda: load_times(local, told.models, told.checkpoints, told.learned, base_s)),
        ]
    return checks


def arena_pages(arena_bytes: int, local: NodeView | None) -> str:
    """The pages that the arena has, or would get from this machine as it is: "hugetlb", "thp" or "small"."""
    if local is not None and local.inventory is not None:
        return local.inventory.arena.pages
    if _pages("free_hugepages") >= huge_pages_needed(arena_bytes):
        return "hugetlb"
    modes = read_text(_SHMEM_HUGE)
    return "thp" if any(f"[{mode}]" in modes for mode in ("always", "within_size", "advise", "force")) else "small"


def huge_pages_needed(arena_bytes: int) -> int:
    """The huge pages that an arena takes, its chunk table included."""
    return -(-arena_bytes // _HUGE_BYTES) + 1


def _arena_pages(arena_bytes: int, local: NodeView | None) -> Finding:
    """What the arena has, or what it would get: reads into small pages reach little more than half of what the disk gives."""
    has = "has" if local is not None and local.inventory is not None else "would get"
    match arena_pages(arena_bytes, local):
        case "hugetlb":
            return Finding("arena_pages", "ok", f"the arena {has} huge pages of the pool")
        case "thp":
            return Finding("arena_pages", "ok", f"the arena {has} transparent huge pages, where the kernel finds some")
    advice = f"{_set_pool(arena_bytes)}; or `echo advise | sudo tee {_SHMEM_HUGE}`; then restart the node"
    return Finding(
        "arena_pages", "warn", f"the arena {has} small pages: loads are slower, attaching to CUDA much slower", advice
    )


def _pool(arena_bytes: int, local: NodeView | None) -> Finding:
    """The pool of huge pages against the arena, which takes all it needs from there or none."""
    total, free = _pages("nr_hugepages"), _pages("free_hugepages")
    needed = huge_pages_needed(arena_bytes)
    if local is not None and local.inventory is not None and local.inventory.arena.pages == "hugetlb":
        return Finding("huge_pages", "ok", f"the pool has {total} huge pages; the arena holds its {needed}")
    if not total:
        return Finding("huge_pages", "ok", f"the pool of huge pages is empty, as it is by default; {_set_pool(arena_bytes)}")
    if free < needed:
        text = f"{free} of {total} huge pages are free; an arena of {size(arena_bytes)} takes {needed}, or none"
        return Finding("huge_pages", "warn", text, f"{_set_pool(arena_bytes)}; or set node.arena_bytes lower")
    return Finding("huge_pages", "ok", f"{free} of {total} huge pages are free; the arena takes {needed}")


def _set_pool(arena_bytes: int) -> str:
    amount, unit = arena_bytes, ""
    for larger in "KMG":
        if amount % 1024:
            break
        amount, unit = amount // 1024, larger
    return f"`sudo ./install.sh hugepages {amount}{unit}`, in the sources, sets the pool to the arena's size, after asking"


def _pages(file: str) -> int:
    text = read_text(_POOL / file).strip()
    return int(text) if text.isdigit() else 0


def _memlock(arena_bytes: int) -> Finding:
    """CUDA pins the arena, and io_uring may register it: both count against this limit, unless one is root."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = "unlimited" if limit == resource.RLIM_INFINITY else size(limit)
    if limit == resource.RLIM_INFINITY or limit >= arena_bytes or os.geteuid() == 0:
        return Finding("memlock", "ok", f"locked memory: {text}" + (", and no limit for root" if os.geteuid() == 0 else ""))
    if not Path("/dev/nvidia0").exists():
        return Finding("memlock", "ok", f"locked memory: {text}; nothing on this machine pins the arena")
    advice = "raise it: LimitMEMLOCK=infinity in the service, or memlock in /etc/security/limits.conf"
    return Finding("memlock", "warn", f"locked memory: {text}, less than the arena's {size(arena_bytes)}", advice)


def _io_uring() -> Finding:
    """Whether this process may make a ring: the one sure way to know."""
    setting = read_text(_URING_DISABLED).strip() or "absent"
    params = ctypes.create_string_buffer(_URING_PARAMS_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    ring = libc.syscall(_SYS_IO_URING_SETUP, 1, params)
    if ring >= 0:
        os.close(ring)
        return Finding("io_uring", "ok", f"allowed (io_uring_disabled {setting})")
    why = os.strerror(ctypes.get_errno())
    if setting in ("1", "2"):
        advice = "`sudo sysctl kernel.io_uring_disabled=0` allows it; until then threads read, with more processor time"
    else:
        advice = "a container's seccomp profile may forbid it; until it is allowed threads read, with more processor time"
    return Finding("io_uring", "warn", f"not allowed: {why} (io_uring_disabled {setting})", advice)


def _direct_reads(data: Path) -> Finding:
    """Whether the file system of the checkpoints reads past the page cache; a nameless file leaves nothing behind."""
    path = existing(data)
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
            advice = "set node.data_dir to a local file system such as ext4 or xfs; until then reads go through the page cache"
            return Finding("direct_reads", "warn", f"the file system at {path} knows no direct reads", advice)
        advice = "the finding of data_dir or disk says more, if there is something to mend"
        return Finding("direct_reads", "warn", f"cannot tell at {path}: {error.strerror}", advice)
    return Finding("direct_reads", "ok", f"the file system at {path} reads past the page cache")


def _disk_budget(limit_bytes: int, data: Path, local: NodeView | None) -> Finding:
    """What checkpoints have of the disk, and may have."""
    means = local.inventory if local is not None else None
    used = means.disk_used_bytes if means is not None else 0
    had = f"checkpoints take {size(used)}" if means is not None else "no node runs that could say what checkpoints take"
    free = shutil.disk_usage(existing(data)).free
    if not limit_bytes:
        return Finding("disk_budget", "ok", f"no budget is set (node.disk_bytes); {had}")
    text = f"{had}; the budget (node.disk_bytes) is {size(limit_bytes)}"
    if limit_bytes - used > free:
        advice = "set node.disk_bytes lower, or free some of the disk"
        return Finding("disk_budget", "warn", f"{text}, and of the disk only {size(free)} are free", advice)
    if used > _FULL * limit_bytes:
        advice = "raise node.disk_bytes, or remove what is not needed (`sllmctl checkpoint ls`, `checkpoint rm`)"
        return Finding("disk_budget", "warn", text, advice)
    return Finding("disk_budget", "ok", text)


def disk_start(
    local: NodeView,
    models: Sequence[ModelView],
    checkpoints: Sequence[CheckpointView],
    learned: Mapping[str, float],
    start_base_s: float,
) -> Finding:
    """What bounds a start of the largest deployed model from disk, by the figures that the planner reckons with."""
    names = {model.digest: model.name for model in models if model.state == "deployed" and model.digest is not None}
    deployed = [checkpoint for checkpoint in checkpoints if checkpoint.digest in names]
    if not deployed:
        return Finding("disk_start", "ok", "no model is deployed that could be held against the disk's speed")
    largest = max(deployed, key=lambda checkpoint: (checkpoint.image_bytes, checkpoint.digest))
    rate = _disk_rate(local, learned)
    what = f"{names[largest.digest]} ({size(largest.image_bytes)})"
    if not rate:
        return Finding("disk_start", "ok", f"the disk was not measured yet; the largest deployed model is {what}")
    worker_s = _worker_s(local, largest, learned, start_base_s)
    load_s = largest.image_bytes / rate
    text = f"{what} takes {duration(load_s)} from disk at {bandwidth(rate)}, its worker {duration(worker_s)}"
    if load_s <= worker_s:
        return Finding("disk_start", "ok", f"{text}: the worker bounds a cold start, not the disk")
    advice = "keep it in memory (`sllmctl checkpoint pin --tier dram`, node.arena_bytes), or use a faster disk"
    return Finding("disk_start", "warn", f"{text}: the disk is the bottleneck of a cold start", advice)


def load_times(
    local: NodeView,
    models: Sequence[ModelView],
    checkpoints: Sequence[CheckpointView],
    learned: Mapping[str, float],
    start_base_s: float,
) -> Finding:
    """Each deployed model's start from this disk, load and worker side by side, against what its requests wait at most."""
    rate = _disk_rate(local, learned)
    images = {checkpoint.digest: checkpoint for checkpoint in checkpoints}
    deployed = [(model, images[model.digest]) for model in models if model.state == "deployed" and model.digest in images]
    if not rate or not deployed:
        return Finding("load_times", "ok", "no model is deployed, or the disk was not measured yet")
    starts = sorted(
        ((max(image.image_bytes / rate, _worker_s(local, image, learned, start_base_s)), model) for model, image in deployed),
        key=lambda start: (-start[0] / start[1].spec.cold_start_timeout_s, start[1].name),
    )
    late = [(seconds, model) for seconds, model in starts if seconds > model.spec.cold_start_timeout_s]
    shown = "; ".join(
        f"{model.name} {duration(seconds)} of {duration(model.spec.cold_start_timeout_s)}" for seconds, model in starts[:_NAMED]
    )
    text = f"from disk at {bandwidth(rate)}, of what a request waits at most: {shown}"
    if len(starts) > _NAMED:
        text += f"; and {len(starts) - _NAMED} more that are less near"
    if late:
        names = ", ".join(model.name for _, model in late)
        pin = f"`sllmctl checkpoint pin {late[0][1].name} --tier dram`"
        advice = f"{pin}, a higher cold_start_timeout_s in the spec, or a faster disk"
        return Finding("load_times", "fault", f"requests give up before {names} can be loaded; {text}", advice)
    return Finding("load_times", "ok", text)


def _disk_rate(local: NodeView, learned: Mapping[str, float]) -> float:
    """Bytes per second, as the planner reckons; 0 where nothing was measured."""
    measured = local.inventory.disk_read_bps if local.inventory is not None else 0.0
    return learned.get(f"bps/{local.id}/disk", measured)


def _worker_s(local: NodeView, checkpoint: CheckpointView, learned: Mapping[str, float], start_base_s: float) -> float:
    kind = local.inventory.devices[0].kind if local.inventory is not None and local.inventory.devices else "cpu"
    return sum(
        learned.get(f"{part}/{checkpoint.digest}/{kind}", learned.get(f"{part}//{kind}", base))
        for part, base in (("build", start_base_s), ("finish", 0.0))
    )

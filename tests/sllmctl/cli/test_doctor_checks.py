"""The checks of `sllmctl doctor` as functions of facts: for each, facts that are right and facts that are not."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schema.errors import InvalidInput
from sllmctl.cli import state_checks
from sllmctl.cli.clock_checks import clock, clock_jump, clock_sync, manager_began
from sllmctl.cli.findings import CHECKS, Finding
from sllmctl.cli.machine_checks import Cuda, cuda, cuda_facts, listeners, port
from sllmctl.cli.process_checks import Group, Process, cgroup, group_of, oom, open_files, process_facts, swap, thp, zombies
from sllmctl.cli.state_checks import (
    Database,
    Leftover,
    Reach,
    database,
    database_facts,
    generation,
    leftover_facts,
    leftovers,
    permissions,
    reach,
    schema_revision,
    state_disk,
    wal,
)
from sllmctl.cli.store_checks import load_times
from sllmctl.state.migrate import revisions
from tests.cluster import ROOT
from tests.sllmctl.fake_manager import CHECKPOINTS, MODELS, NODES

DB = Database(Path("/s/state.db"), revision="0004", cluster="c1", generation=7)
BACKUP = Path("/s/backups/it is.db")
DAMAGED = Database(Path("/s/state.db"), "damaged", "page 3", backup=BACKUP)
KNOWN = {"0001", "0002", "0003", "0004"}
OURS = Process("store", 12, open_files=10, files_limit=4096)


def changed(facts: Any, **values: Any) -> Any:
    from msgspec.structs import replace

    return replace(facts, **values)


def disk(free: int, *, files: int = 1000, files_free: int = 500) -> Any:
    return SimpleNamespace(f_bavail=free, f_frsize=1, f_files=files, f_favail=files_free)


def old(size_bytes: int, age_s: float, *, held: bool = False) -> Leftover:
    return Leftover(Path("/d/tmp/ingest+ab"), size_bytes, age_s, held)


def with_timeout(seconds: float) -> list[Any]:
    return [changed(MODELS[0], spec=changed(MODELS[0].spec, cold_start_timeout_s=seconds))]


CASES: list[tuple[str, str, Callable[[], Finding], str]] = [
    ("database", "ok", lambda: database(DB), "whole"),
    ("database", "ok", lambda: database(changed(DB, state="absent")), "made at the first start"),
    ("database", "ok", lambda: database(changed(DB, state="empty")), "made at the first start"),
    ("database", "warn", lambda: database(changed(DB, state="unchecked", why="5 s")), "PRAGMA quick_check"),
    ("database", "fault", lambda: database(changed(DB, state="unreadable", why="no right")), "cannot be read: no right"),
    ("database", "fault", lambda: database(changed(DB, state="foreign")), "something else"),
    ("database", "fault", lambda: database(changed(DB, state="damaged", why="page 3")), "its -wal and -shm away together"),
    ("database", "fault", lambda: database(DAMAGED), "cp -p '/s/backups/it is.db' /s/state.db"),
    (
        "schema",
        "ok",
        lambda: schema_revision(changed(DB, state="absent", revision=None), "0004", KNOWN, running=False),
        "makes",
    ),
    ("schema", "ok", lambda: schema_revision(changed(DB, revision=None), "0004", KNOWN, running=False), "not known"),
    ("schema", "ok", lambda: schema_revision(DB, "0004", KNOWN, running=True), "0004"),
    ("schema", "ok", lambda: schema_revision(changed(DB, revision="0002"), "0004", KNOWN, running=False), "migrates"),
    ("schema", "warn", lambda: schema_revision(changed(DB, revision="0002"), "0004", KNOWN, running=True), "older manager"),
    ("schema", "fault", lambda: schema_revision(changed(DB, revision="0009"), "0004", KNOWN, running=False), "newer sllmctl"),
    ("wal", "ok", lambda: wal(DB), "0 B"),
    ("wal", "warn", lambda: wal(changed(DB, wal_bytes=1 << 30)), "1.0 GiB"),
    ("permissions", "ok", lambda: permissions([Reach(Path("/a"), 1, 0, True)], 1), "owner alone"),
    ("permissions", "ok", lambda: permissions([Reach(Path("/a"), 1, 0o055, False)], 1), "owner alone"),
    ("permissions", "ok", lambda: permissions([Reach(Path("/a"), 5, 0, True)], 0), "owner alone"),
    ("permissions", "warn", lambda: permissions([Reach(Path("/a"), 1, 0o020, False)], 1), "chmod go-rwx /a"),
    ("permissions", "fault", lambda: permissions([Reach(Path("/a b"), 1, 0o004, True)], 1), "chmod go-rwx '/a b'"),
    ("permissions", "fault", lambda: permissions([Reach(Path("/a"), 5, 0, False)], 1), "chown -R 1 /a"),
    ("permissions", "ok", lambda: permissions([Reach(Path("/etc/sllmctl/config.toml"), 0, 0o044, False)], 1), "owner alone"),
    ("permissions", "fault", lambda: permissions([Reach(Path("/a"), 0, 0, True)], 1), "chown -R 1 /a"),
    ("state_disk", "ok", lambda: state_disk(Path("/s"), disk(2 << 30)), "2.0 GiB"),
    ("state_disk", "ok", lambda: state_disk(Path("/s"), disk(2 << 30, files=0, files_free=0)), "2.0 GiB"),
    ("state_disk", "warn", lambda: state_disk(Path("/s"), disk(200 << 20)), "du -xh /s"),
    ("state_disk", "warn", lambda: state_disk(Path("/s"), disk(2 << 30, files_free=5)), "5 of 1000"),
    ("state_disk", "fault", lambda: state_disk(Path("/s"), disk(1 << 20)), "1.0 MiB"),
    ("leftovers", "ok", lambda: leftovers([], 100), "nothing"),
    ("leftovers", "ok", lambda: leftovers([old(9 << 30, 9e9, held=True), old(9 << 30, 60)], 100), "nothing"),
    ("leftovers", "ok", lambda: leftovers([old(1 << 20, 7200)], 86400), "goes on with it"),
    ("leftovers", "warn", lambda: leftovers([old(3 << 30, 7200)], 86400), "rm -r /d/tmp/ingest+ab"),
    ("leftovers", "warn", lambda: leftovers([old(1 << 20, 90000)] * 7, 86400), "and 2 more"),
    ("open_files", "ok", lambda: open_files([OURS], (9999, 9999)), "this shell's limit"),
    ("open_files", "ok", lambda: open_files([Process("manager", 9, 9, 9000)], (64, 64)), "the manager's limit"),
    ("open_files", "warn", lambda: open_files([], (1024, 2048)), "ulimit -n 2048"),
    ("open_files", "fault", lambda: open_files([changed(OURS, open_files=4000)], (9999, 9999)), "prlimit --pid 12"),
    ("swap", "ok", lambda: swap([OURS]), "nothing"),
    ("swap", "warn", lambda: swap([changed(OURS, swap_bytes=1 << 30)]), "1.0 GiB of store 12"),
    ("oom", "ok", lambda: oom([OURS, Process("worker:inst_1", 13, oom_adj=300)]), "not kill ours"),
    ("oom", "warn", lambda: oom([changed(OURS, oom_adj=300)]), "tee /proc/12/oom_score_adj"),
    ("zombies", "ok", lambda: zombies([OURS]), "no child"),
    ("zombies", "warn", lambda: zombies([changed(OURS, zombies=(14, 15))]), "14, 15 of store 12"),
    ("thp", "ok", lambda: thp("", ""), "no transparent"),
    ("thp", "ok", lambda: thp("always [madvise] never\n", "[always] defer\n"), "madvise, defrag always"),
    ("thp", "warn", lambda: thp("[always] madvise never\n", "[always] defer\n"), "tee /sys/kernel"),
    ("cgroup", "ok", lambda: cgroup(Group()), "no memory limit"),
    ("cgroup", "ok", lambda: cgroup(Group(known=False)), "not known"),
    ("cgroup", "warn", lambda: cgroup(Group(memory_limit_bytes=1 << 30, oom_kills=2)), "killed 2"),
    ("cgroup", "fault", lambda: cgroup(Group(pids_limit=100, pids=95)), "95 of 100"),
    ("clock", "ok", lambda: clock(1000.0, 990.0), "1970"),
    ("clock", "fault", lambda: clock(8000.0, 800.0), "2h"),
    ("clock_sync", "ok", lambda: clock_sync(True), "time server keeps"),
    ("clock_sync", "ok", lambda: clock_sync(None), "does not say"),
    ("clock_sync", "warn", lambda: clock_sync(False), "timedatectl"),
    ("clock_jump", "ok", lambda: clock_jump(None), "no manager"),
    ("clock_jump", "ok", lambda: clock_jump((1000.0, 1004.0)), "was not set"),
    ("clock_jump", "warn", lambda: clock_jump((8200.0, 1000.0)), "forward by 2h"),
    ("clock_jump", "warn", lambda: clock_jump((1000.0, 8200.0)), "back by 2h"),
    ("port", "ok", lambda: port("h", 80, None, ()), "free"),
    ("port", "ok", lambda: port("::1", 80, None, ()), "[::1]:80 is free"),
    ("port", "fault", lambda: port("h", 80, InvalidInput("it asks for no key"), ()), "no key"),
    ("port", "fault", lambda: port("h", 80, OSError(errno.EADDRINUSE, ""), ["nginx (pid 3)"]), "taken by nginx (pid 3)"),
    ("port", "fault", lambda: port("h", 80, OSError(errno.EADDRINUSE, ""), ()), "may not look at"),
    ("port", "fault", lambda: port("h", 80, OSError(errno.EACCES, "Permission denied"), ()), "Permission denied"),
    ("cuda", "ok", lambda: cuda(Cuda()), "no NVIDIA device"),
    ("cuda", "ok", lambda: cuda(Cuda(1, "570.1", (12, 8), "12.9.1")), "bindings 12.9.1"),
    ("cuda", "warn", lambda: cuda(Cuda(1, "570.1", (12, 8))), "cuda-bindings<13"),
    ("cuda", "fault", lambda: cuda(Cuda(1, "570.1")), "libcuda.so.1"),
    ("cuda", "fault", lambda: cuda(Cuda(1, "570.1", (12, 8), "13.0.0")), "newer than the driver"),
    ("load_times", "ok", lambda: load_times(NODES[0], (), CHECKPOINTS, {}, 0.5), "no model"),
    ("load_times", "ok", lambda: load_times(NODES[0], with_timeout(60), CHECKPOINTS, {}, 0.5), "qwen"),
    ("load_times", "fault", lambda: load_times(NODES[0], with_timeout(0.1), CHECKPOINTS, {}, 0.5), "pin qwen --tier dram"),
]


@pytest.mark.parametrize(("check", "level", "judge", "says"), CASES, ids=[f"{case[0]}-{case[1]}-{case[3]}" for case in CASES])
def test_judgement(check: str, level: str, judge: Callable[[], Finding], says: str) -> None:
    finding = judge()
    assert (finding.check, finding.level) == (check, level)
    assert says in f"{finding.message}; {finding.advice}"
    assert level == "ok" or finding.advice, "what to do is said"


def test_a_node_takes_no_manager_of_another_cluster_or_of_an_older_database(tmp_path: Path) -> None:
    from sllmctl.cli.state_checks import _Identity

    path = tmp_path / "identity.json"
    assert generation(DB, path, None).level == "ok"
    assert generation(changed(DB, cluster="", state="unreadable"), path, _Identity("c1", 7)).level == "ok"
    lost = generation(changed(DB, cluster="", state="absent"), path, _Identity("c1", 7))
    assert (lost.level, "belongs to cluster c1" in lost.message, f"rm {path}" in lost.advice) == ("fault", True, True)
    broken = generation(DB, path, ValueError("no JSON"))
    assert (broken.level, "no JSON" in broken.message, f"rm {path}" in broken.advice) == ("fault", True, True)
    assert generation(DB, path, PermissionError()).level == "ok"
    assert generation(DB, path, _Identity("c1", 7)).level == "ok"
    assert "another" not in generation(DB, path, _Identity("c1", 6)).message
    older = generation(DB, path, _Identity("c1", 8))
    assert (older.level, f"rm {path}" in older.advice) == ("fault", True)
    assert generation(DB, path, _Identity("c2", 1)).level == "fault"


def test_a_database_is_read_whole_damaged_and_in_use_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, backups = tmp_path / "state.db", tmp_path / "backups"
    assert database_facts(path, backups).state == "absent"
    path.touch()
    assert database_facts(path, backups).state == "empty"
    head, _ = revisions()
    with sqlite3.connect(path) as made:
        made.execute("PRAGMA journal_mode=WAL")
        made.execute("CREATE TABLE alembic_version (version_num)")
        made.execute("INSERT INTO alembic_version VALUES (?)", (head,))
        made.execute("CREATE TABLE cluster (uuid, generation)")
        made.execute("INSERT INTO cluster VALUES ('c1', 3)")
        made.commit()
        facts = database_facts(path, backups)
        assert (facts.state, facts.revision, facts.cluster, facts.generation) == ("whole", head, "c1", 3)
        assert facts.wal_bytes > 0
        killed = tmp_path / "killed"
        killed.mkdir()
        for each in tmp_path.glob("state.db*"):
            shutil.copy(each, killed)
    made.close()
    backups.mkdir()
    (backups / "state-0001.db").write_bytes(b"")
    facts = database_facts(path, backups)
    assert (facts.state, facts.backup) == ("whole", backups / "state-0001.db")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["backups", "killed", "state.db"], "SQLite made nothing"
    path.write_bytes(path.read_bytes()[:4096] + os.urandom(4096))
    facts = database_facts(path, backups)
    assert (facts.state, bool(facts.why)) == ("damaged", True)

    before = {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in killed.iterdir()}
    assert set(before) == {"state.db", "state.db-wal", "state.db-shm"}
    facts = database_facts(killed / "state.db", backups)
    assert (facts.state, facts.cluster) == ("whole", "c1"), "what only the log of a killed manager holds is read"
    assert {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in killed.iterdir()} == before
    with monkeypatch.context() as patient:
        patient.setattr(state_checks, "_CHECK_S", 0.0)
        patient.setattr(state_checks, "_CHECK_STEPS", 1)
        facts = database_facts(killed / "state.db", backups)
    assert (facts.state, facts.revision, facts.cluster) == ("unchecked", head, "c1"), "what was read by then is kept"
    (killed / "state.db-shm").unlink()
    assert database_facts(killed / "state.db", backups).state == "unchecked"
    assert not (killed / "state.db-shm").exists()


def test_a_database_of_something_else_and_one_that_cannot_be_read_are_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE invoices (id)")
    made.close()
    assert database_facts(path, tmp_path).state == "foreign"
    path.unlink()
    path.mkdir()
    assert database_facts(path, tmp_path).state == "unreadable"


def test_who_reaches_a_file_is_told_with_the_directories_above_it(tmp_path: Path) -> None:
    directory, file = tmp_path / "state", tmp_path / "state" / "file"
    directory.mkdir()
    file.write_text("")
    file.chmod(0o644)
    above = 0o007 if all(each.stat().st_mode & 1 for each in tmp_path.parents) and tmp_path.stat().st_mode & 1 else 0
    directory.chmod(0o700)
    found = reach(file, secret=True)
    assert found is not None
    assert (found.others, found.owner) == (0, os.geteuid())
    directory.chmod(0o701)
    found = reach(file, secret=True)
    assert found is not None
    assert found.others == 0o004 & above
    assert reach(directory / "none", secret=True) is None


def test_leftovers_have_sizes_ages_and_holders(tmp_path: Path) -> None:
    left = tmp_path / "tmp" / "ingest+abc"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"x" * 100_000)
    for path in (left / "part", left):
        os.utime(path, (0, 0))
    script = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        (found,) = leftover_facts(tmp_path)
        assert found.held
    began = time.time()
    (found,) = leftover_facts(tmp_path)
    assert (found.path, found.held, found.size_bytes >= 100_000) == (left, False, True)
    assert found.age_s >= began - 1


def test_processes_are_read_from_the_kernel() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    (own,) = process_facts([("manager", os.getpid()), ("gone", 2**22 + 1)])
    assert child.pid in own.zombies
    child.wait()
    (own,) = process_facts([("manager", os.getpid())])
    assert child.pid not in own.zombies
    assert own.open_files > 2
    began = manager_began(os.getpid(), time.time())
    assert began is not None
    assert 0 <= time.time() - began < 86400
    assert manager_began(2**22 + 1, 0.0) is None


def test_limits_of_control_groups_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    inner = root / "system.slice" / "sllmctl.service"
    inner.mkdir(parents=True)
    (proc / "5").mkdir(parents=True)
    (proc / "5" / "cgroup").write_text("0::/system.slice/sllmctl.service\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("400\n")
    (inner.parent / "memory.stat").write_text("anon 150\nfile 250\ninactive_file 200\nactive_file 40\nunevictable 10\n")
    (root / "pids.max").write_text("50\n")
    (root / "pids.current").write_text("7\n")
    assert group_of(5, proc, root) == Group(known=False), "of the first version"
    (root / "cgroup.controllers").write_text("memory pids\n")
    assert group_of(5, proc, root) == Group(840, 1000, 50, 7, 3)
    assert group_of(6, proc, root / "none") == Group(known=False)


def test_who_holds_a_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        assert any(f"(pid {os.getpid()})" in each for each in listeners(number))
    assert not any(f"(pid {os.getpid()})" in each for each in listeners(number))


def test_cuda_is_looked_for_without_being_needed() -> None:
    assert cuda(cuda_facts()).check == "cuda"


def test_every_check_has_its_line_and_every_line_its_check() -> None:
    """What the sources return, the table beside them, and the page for readers are one list."""
    said: dict[str, str] = {}
    for path in sorted((ROOT / "sllmctl" / "cli").glob("*.py")):
        for check, level in re.findall(r'Finding\(\s*"(\w+)",\s*(.*?)[,)]', path.read_text(), re.DOTALL):
            said[check] = "fault" if '"fault"' in level or said.get(check) == "fault" else "warn"
    assert set(said) == set(CHECKS)
    page = (ROOT / "docs" / "doctor.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (\w+) \|$", page, re.MULTILINE)
    assert rows == [(check, what, said[check]) for check, what in CHECKS.items()]

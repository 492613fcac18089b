"""`sllmctl doctor`: each finding, brought about for real where that can be done."""

from __future__ import annotations

import codecs
import contextlib
import errno
import importlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from schema.errors import Fault
from schema.states import InstanceState, NodeState, TierState
from schema.version import VERSION
from sllmctl.cli import checks, looks, store_checks, told
from sllmctl.cli.checks import Finding, check_machine, check_python, socket_state
from sllmctl.cli.main import run
from sllmctl.cli.store_checks import disk_start
from sllmctl.config import Settings
from tests.sllmctl.cli.conftest import Sllmctl
from tests.sllmctl.fake_manager import CHECKPOINTS, INSTANCES, MODELS, NODES, STATUS, FakeManager


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory with short paths."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="sl"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers late here answers."""
    monkeypatch.setattr(looks, "HANG_S", 60.0)
    monkeypatch.setattr(told, "ANSWER_S", 60.0)


def _settings(state: Path, **flags: Any) -> Settings:
    return Settings.load({"state_dir": str(state), "api.port": 0, **flags}, {"HOME": "/nowhere"})


def _found(settings: Settings) -> dict[str, Finding]:
    findings = list(check_machine(settings))
    assert len({finding.check for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.level == "ok" or finding.advice, f"{finding} says not what to do"
    return {finding.check: finding for finding in findings}


def _bind(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    return sock


def test_a_machine_on_which_nothing_runs_yet(state: Path) -> None:
    found = _found(_settings(state))
    assert (found["manager"].level, found["agent"].level) == ("warn", "ok")
    assert (found["state_dir"].level, found["port"].level, found["clock"].level) == ("ok", "ok", "ok")
    assert "sllmctl serve" in found["manager"].advice


def test_a_manager_that_answers_is_described(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    found = _found(settings)
    assert found["manager"].level == "ok"
    assert f"pid {STATUS.pid}, 1 of 2 nodes ready" in found["manager"].message
    assert "port" not in found, "the port is the manager's own"
    assert found["agent"].level == "fault", "a manager runs, its agent does not"
    assert found["versions"].level == ("ok" if STATUS.version == VERSION else "warn")
    manager.answer("GET status", 200, msgspec.structs.replace(STATUS, version="0.0.1"))
    assert "0.0.1" in _found(settings)["versions"].message


def test_a_manager_alone_is_no_fault(state: Path, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "missing_node_packages", lambda: ["torch"])
    found = _found(_settings(state, admin_socket=str(manager.socket)))
    assert (found["agent"].level, "manager alone" in found["agent"].message) == ("warn", True)


def test_models_that_no_node_can_hold_are_named(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    assert _found(settings)["places"].level == "ok"
    why = "no node can hold model 'qwen': 1 node with a DRAM budget below the weights"
    manager.answer("GET models", 200, {"items": [msgspec.structs.replace(MODELS[0], instances={}, no_place=why)]})
    found = _found(settings)["places"]
    assert (found.level, found.message) == ("warn", f"1 without a place: {why}")


def test_copies_in_quarantine_and_failed_instances_are_named(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    found = _found(settings)
    assert found["quarantine"].level == "ok"
    assert "1 failed: " in found["instances"].message, "it is about to be tried again"
    (one, *rest) = CHECKPOINTS
    bad = msgspec.structs.replace(one.placements[0], state=TierState.QUARANTINED, reason="partition_0.bin is wrong")
    failed = msgspec.structs.replace(INSTANCES[0], state=InstanceState.FAILED, fault=Fault("invalid_checkpoint", "it is wrong"))
    items = [msgspec.structs.replace(one, placements=(bad, *one.placements[1:])), *rest]
    manager.answer("GET checkpoints", 200, {"items": items})
    manager.answer("GET instances", 200, {"items": [failed] * 7})
    found = _found(settings)
    assert found["quarantine"].level == "warn"
    assert f"{one.digest[:12]} (qwen) on local:disk: partition_0.bin is wrong" in found["quarantine"].message
    assert found["instances"].level == "warn"
    assert "7 failed: inst_1 of qwen on local (failed): it is wrong" in found["instances"].message
    assert "and 2 more" in found["instances"].message


def test_a_copy_in_quarantine_beside_a_sound_one_is_named(state: Path, manager: FakeManager) -> None:
    why = "copy inplace1 is in quarantine: it was written to"
    placement = msgspec.structs.replace(CHECKPOINTS[0].placements[0], state=TierState.RESIDENT, reason=why)
    manager.answer("GET checkpoints", 200, {"items": [msgspec.structs.replace(CHECKPOINTS[0], placements=(placement,))]})
    found = _found(_settings(state, admin_socket=str(manager.socket)))["quarantine"]
    assert found.level == "warn"
    assert f"on local:disk: {why}" in found.message


def test_processes_of_nodes_that_run_another_version_are_named(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    for store, level in ((STATUS.version, "ok"), ("0.0.1", "warn")):
        software = {"agent": f"sllmctl-agent {STATUS.version}", "store": f"sllmctl-store {store}"}
        inventory = msgspec.structs.replace(NODES[0].inventory, software=software)
        manager.answers["GET nodes"] = []
        manager.answer("GET nodes", 200, {"items": [msgspec.structs.replace(NODES[0], inventory=inventory), NODES[1]]})
        found = _found(settings)["node_versions"]
        assert found.level == level
    assert found.message == f"the manager runs version {STATUS.version}, but store on local runs sllmctl-store 0.0.1"


def test_a_manager_that_answers_nonsense_or_is_not_ready(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    manager.answers["GET status"] = [(200, b"{}")]
    assert _found(settings)["manager"].level == "fault"
    manager.forget()
    manager.answer("GET status", 200, {**{name: getattr(STATUS, name) for name in STATUS.__struct_fields__}, "ready": False})
    assert _found(settings)["manager"].level == "warn"


def test_sockets_left_behind_are_told_from_living_ones(state: Path) -> None:
    settings = _settings(state)
    agent = Path(settings.node.run_dir) / "agent.sock"
    _bind(settings.admin_socket).close()
    with _bind(agent) as living:
        assert _found(settings)["agent"].level == "warn", "bound, but nobody listens"
        living.listen(1)
        found = _found(settings)
    assert (found["manager"].level, found["agent"].level) == ("warn", "ok")
    assert "died" in found["manager"].message


def test_who_is_behind_a_socket(state: Path) -> None:
    path = state / "x"
    assert socket_state(path) == "absent"
    path.write_text("")
    assert socket_state(path) == "odd"
    assert _found(_settings(state, admin_socket=str(path)))["manager"].level == "fault"
    path.unlink()
    path.symlink_to(state)
    assert socket_state(path) == "odd"


def test_a_manager_that_answers_no_more_is_waited_for_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "ANSWER_S", 0.2)
    settings = _settings(state)
    with _bind(settings.admin_socket) as hung:
        hung.listen(8)
        assert _found(settings)["manager"].level == "fault"
        hung.settimeout(0)
        taken = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                hung.accept()[0].close()
                taken += 1
    assert taken <= 3, "to see who is there, and to ask for its status"


def test_a_manager_that_answers_half_is_said_to(state: Path, manager: FakeManager) -> None:
    manager.answers["GET instances"] = [(404, b"{}")]
    found = _found(_settings(state, admin_socket=str(manager.socket)))
    assert found["manager"].level == "fault"
    assert found["versions"].check == "versions", "what it did answer is looked at"
    assert "instances" not in found


def test_an_agent_that_listens_and_does_nothing(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    with _bind(Path(settings.node.run_dir) / "agent.sock") as hung:
        hung.listen(8)
        assert _found(settings)["agent"].level == "ok"
        lost = msgspec.structs.replace(NODES[0], state=NodeState.UNREACHABLE)
        manager.answers["GET nodes"] = []
        manager.answer("GET nodes", 200, {"items": [lost, NODES[1]]})
        found = _found(settings)["agent"]
    assert (found.level, "does not reach it" in found.message) == ("fault", True)


def test_a_socket_whose_queue_is_full_has_a_listener(state: Path) -> None:
    with _bind(state / "x") as busy, contextlib.ExitStack() as waiting:
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                knocking = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                knocking.setblocking(False)
                knocking.connect(str(state / "x"))
        assert socket_state(state / "x") == "answers"


@contextlib.contextmanager
def _as_somebody_else() -> Iterator[None]:
    """As a user who is not root, for files that are root's."""
    if os.geteuid() != 0:
        pytest.skip("takes root")
    # What the checks import when they need it may be root's, too; a codec that could not be imported once stays unknown.
    importlib.import_module("sllmctl.state")
    codecs.lookup("idna")
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_what_is_another_users_is_said_to_be(state: Path) -> None:
    settings = _settings(state)
    (state / "node").mkdir(mode=0o700)
    with sqlite3.connect(state / "state.db") as made:
        made.execute("CREATE TABLE t (x)")
    made.close()
    (state / "state.db").chmod(0o600)
    with _as_somebody_else():
        found = _found(settings)
    assert (found["state_dir"].level, found["data_dir"].level) == ("fault", "ok"), "said once"
    os.chown(state, 65534, 65534)
    with _as_somebody_else():
        found = _found(settings)
        below = _found(_settings(state / "node" / "deeper"))
    assert (found["state_dir"].level, found["data_dir"].level) == ("ok", "fault")
    assert f"{state}/node is user 0's" in found["data_dir"].message
    assert (found["database"].level, "cannot be read" in found["database"].message) == ("fault", True)
    assert "backup" not in found["database"].advice
    assert found["generation"].level == "ok"
    assert (found["permissions"].level, f"chown -R 65534 {state}/state.db" in found["permissions"].advice) == ("fault", True)
    assert below["state_dir"].level == "fault"


@pytest.fixture
def dead_mount(state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on a file system whose server is away: who looks at it gets no answer, until the test has ended."""
    path, real, back = state / "mount", os.stat, threading.Event()
    path.mkdir()

    def stat(each: Any, *more: Any, **named: Any) -> os.stat_result:
        if not isinstance(each, int) and path in (Path(os.fsdecode(each)), *Path(os.fsdecode(each)).parents):
            back.wait(60)
        return real(each, *more, **named)

    with monkeypatch.context() as hanging:
        hanging.setattr(os, "stat", stat)
        yield path
        back.set()


def test_a_file_system_that_hangs_holds_up_no_other_check(
    state: Path, dead_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "HANG_S", 5.0)
    found = _found(_settings(state, **{"node.data_dir": str(dead_mount / "node")}))
    for check in ("data_dir", "disk", "direct_reads", "disk_budget", "permissions"):
        assert (found[check].level, "no answer within 5 s" in found[check].message) == ("fault", True)
    assert found["state_dir"].level == found["database"].level == "ok"


def test_a_manager_whose_socket_hangs_is_not_called_absent(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back = threading.Event()
    monkeypatch.setattr(looks, "HANG_S", 2.0)
    monkeypatch.setattr(checks, "socket_state", lambda _: back.wait(60) and "absent")
    found = _found(_settings(state))
    back.set()
    assert "no answer" in found["manager"].message
    assert "port" not in found, "a manager may hold it"


def test_a_disk_that_fails_is_a_finding(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "disk_usage", fail)
    disk = _found(_settings(state))["disk"]
    assert (disk.level, disk.message) == ("fault", f"cannot be looked at: {state}: Input/output error")


def test_a_file_system_that_is_read_only(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = state / "data"
    data.mkdir()
    figures = os.statvfs(state)
    read_only = os.statvfs_result((*figures[:8], figures.f_flag | os.ST_RDONLY, figures.f_namemax))
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != data)
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    found = _found(_settings(state, **{"node.data_dir": str(data)}))
    assert (found["state_dir"].level, found["data_dir"].level) == ("ok", "fault")
    assert "read-only" in found["data_dir"].message
    assert f'remount,rw "$(findmnt -no TARGET -T {data})"' in found["data_dir"].advice


def test_an_address_that_would_need_keys(state: Path) -> None:
    found = _found(_settings(state, **{"api.host": "0.0.0.0"}))["port"]
    assert (found.level, "api.without_keys" in found.message) == ("fault", True)
    assert _found(_settings(state, **{"api.host": "0.0.0.0", "api.without_keys": True}))["port"].level == "ok"


def test_a_port_that_is_taken(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = _found(_settings(state, **{"api.port": taken.getsockname()[1]}))
    assert (found["port"].level, "is taken" in found["port"].message) == ("fault", True)
    assert _found(_settings(state, **{"api.host": "192.0.2.1", "api.without_keys": True}))["port"].level == "fault"


def test_the_state_directory(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state.chmod(0o777)
    assert _found(_settings(state))["state_dir"].level == "warn"
    state.chmod(0o700)
    assert "made at the first start" in _found(_settings(state / "not" / "yet"))["state_dir"].message
    (state / "file").write_text("")
    found = _found(_settings(state / "file" / "below"))
    assert (found["state_dir"].level, found["manager"].level) == ("fault", "warn"), "nobody has a socket there"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != state)
    assert _found(_settings(state))["state_dir"].level == "fault"


def test_memory_and_disk_that_are_too_small(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _found(_settings(state, **{"node.arena_bytes": "4096TiB"}))["memory"].level == "fault"
    monkeypatch.setattr(checks, "meminfo", lambda: {"MemAvailable": 1 << 20})
    assert _found(_settings(state, **{"node.arena_bytes": "64MiB"}))["memory"].level == "warn"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 30))
    assert _found(_settings(state))["disk"].level == "warn"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    found = _found(_settings(state))
    assert (found["disk"].level, found["shm"].level) == ("fault", "warn")


def test_pages_pools_and_limits(state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pool, shmem = tmp_path / "pool", tmp_path / "shmem_enabled"
    pool.mkdir()
    monkeypatch.setattr(store_checks, "_POOL", pool)
    monkeypatch.setattr(store_checks, "_SHMEM_HUGE", shmem)
    settings = _settings(state, **{"node.arena_bytes": "64MiB"})

    def pages(total: int, free: int, mode: str) -> tuple[Finding, Finding]:
        (pool / "nr_hugepages").write_text(f"{total}\n")
        (pool / "free_hugepages").write_text(f"{free}\n")
        shmem.write_text(f"always [{mode}] other\n")
        found = _found(settings)
        return found["arena_pages"], found["huge_pages"]

    arena, huge = pages(0, 0, "never")
    assert (arena.level, huge.level) == ("warn", "ok")
    assert "`sudo ./install.sh hugepages 64M`" in arena.advice
    arena, _ = pages(0, 0, "advise")
    assert (arena.level, "transparent" in arena.message) == ("ok", True)
    arena, huge = pages(40, 33, "never")
    assert (arena.level, huge.level) == ("ok", "ok")
    arena, huge = pages(40, 32, "never")
    assert (arena.level, huge.level) == ("warn", "warn")
    assert "takes 33" in huge.message
    monkeypatch.setattr(checks, "meminfo", lambda: {"MemAvailable": 1 << 20})
    assert _found(settings)["memory"].level == "warn"
    pages(40, 33, "never")
    assert _found(settings)["memory"].level == "ok", "the pool is none of what is available to others"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert "1.0 MiB" in _found(settings)["memlock"].message


def test_direct_reads_and_the_disks_budget(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _found(_settings(state, **{"node.disk_bytes": "1GiB"}))
    assert found["disk_budget"].level == "ok"
    assert found["disk_budget"].message == (
        "no node runs that could say what checkpoints take; the budget (node.disk_bytes) is 1.0 GiB"
    )
    assert found["io_uring"].level in ("ok", "warn")
    assert _found(_settings(state, **{"node.disk_bytes": "4096TiB"}))["disk_budget"].level == "warn"
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert _found(_settings(state))["direct_reads"].level == "warn"


def test_what_bounds_a_cold_start_is_told_by_the_planners_figures(state: Path, manager: FakeManager) -> None:
    settings = _settings(state, admin_socket=str(manager.socket))
    finding = _found(settings)["disk_start"]
    assert finding.level == "warn"
    assert "qwen" in finding.message
    assert "the disk is the bottleneck" in finding.message
    assert "pin --tier dram" in finding.advice
    node, models, checkpoints = NODES[0], MODELS, CHECKPOINTS
    learned = {f"build/{checkpoints[0].digest}/cpu": 9.0, f"finish/{checkpoints[0].digest}/cpu": 1.0}
    slow_worker = disk_start(node, models, checkpoints, learned, 0.5)
    assert (slow_worker.level, "its worker 10 s" in slow_worker.message) == ("ok", True)
    slow_disk = disk_start(node, models, checkpoints, {**learned, f"bps/{node.id}/disk": 1e6}, 0.5)
    assert slow_disk.level == "warn"
    assert disk_start(node, (), checkpoints, learned, 0.5).level == "ok"
    assert "not measured" in disk_start(NODES[1], models, checkpoints, {}, 0.5).message


def test_a_clock_behind_what_was_written(state: Path) -> None:
    database = state / "state.db"
    database.write_text("")
    ahead = database.stat().st_mtime + 7200
    os.utime(database, (ahead, ahead))
    assert _found(_settings(state))["clock"].level == "fault"


def test_pythons_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NODE_PACKAGES", ("click", "surely-not-installed"))
    python, packages = check_python()
    assert (python.level, packages.level) == ("ok", "warn")
    assert "surely-not-installed" in packages.message
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert next(check_python()).level == "fault"


@pytest.mark.parametrize("spec", [None, object()], ids=["not compiled", "compiled"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_generates_on_processors_may_not_be_compiled(spec: object, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NODE_PACKAGES", ("click",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = {each.check: each.level for each in check_python()}.get("compiled")
    assert found == ("ok" if spec else "warn" if machine == "x86_64" else None)


def test_the_command_exits_with_8_for_a_fault_only(sllmctl: Sllmctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(level: str) -> Any:
        return lambda *_: [Finding("disk", level, "3 bytes free", "free some")]  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "check_machine", findings("warn"))
    assert sllmctl("doctor").code == 0
    monkeypatch.setattr(checks, "check_machine", findings("fault"))
    said = sllmctl("doctor")
    assert (said.code, "3 bytes free; free some" in said.out) == (8, True)
    assert "faults: 1" in said.err
    last = json.loads(sllmctl("doctor", "-o", "json").out)[-1]
    assert last == {"check": "disk", "level": "fault", "message": "3 bytes free", "advice": "free some"}


def test_settings_that_cannot_be_read_are_a_finding(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLLM_API_PORT", "http")
    assert run(["doctor", "-o", "json"]) == 8
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert found["config"]["level"] == "fault"
    assert "SLLM_API_PORT" in found["config"]["message"]
    monkeypatch.delenv("SLLM_API_PORT")
    monkeypatch.setenv("SLLM_DATABASE_URL", "postgresql://db/state")
    assert run(["doctor"]) == 8
    assert "is not a SQLite file" in capsys.readouterr().out
